//! A service that is there over TCP, and a client that knows its certificate by what the service
//! has printed.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{self, CryptoProvider, ring::default_provider};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme, StreamOwned,
};

use crate::client::{Answer, Service, answer_of};
use crate::common::place::{LIMIT, Place};

pub const LOOK: &str = "look-0123456789abcdef0123456789abcdef";
pub const DO: &str = "do-fedcba9876543210fedcba9876543210";

/// A service with a TCP port.
pub struct OverTcp {
    pub service: Service,
    pub address: SocketAddr,
    /// What it has printed of its certificate.
    pub told: String,
    config: Arc<ClientConfig>,
}

/// A file with the two tokens.
pub fn tokens(place: &Place) -> String {
    let text = format!("look {LOOK}\ndo {DO}\n");
    private(place, "tokens", text.as_bytes())
}

/// A file that nobody else may read.
pub fn private(place: &Place, name: &str, bytes: &[u8]) -> String {
    let file = place.file(name, bytes);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    file
}

impl OverTcp {
    pub fn start(place: &Place, words: &str) -> Self {
        Self::start_at(place, 0, words)
    }

    /// One at this port; 0 is any.
    pub fn start_at(place: &Place, port: u16, words: &str) -> Self {
        let tokens = tokens(place);
        let words = format!("--listen 127.0.0.1:{port} --tokens {tokens} {words}");
        let mut service = Service::start(place, &words);
        let out = service.child.as_mut().unwrap().stdout.as_mut().unwrap();
        let mut out = BufReader::new(out);
        let (mut first, mut told) = (String::new(), String::new());
        out.read_line(&mut first).unwrap();
        out.read_line(&mut told).unwrap();
        let address = first.trim_end().strip_prefix("https://").unwrap();
        let address = address.trim_end_matches('/').parse().unwrap();
        let (_, print) = told.trim_end().split_once(": ").unwrap();
        let known = Arc::new(Known {
            print: print.to_owned(),
            provider: Arc::new(default_provider()),
        });
        let config = ClientConfig::builder_with_provider(Arc::clone(&known.provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(known)
            .with_no_client_auth();
        Self {
            service,
            address,
            told,
            config: Arc::new(config),
        }
    }

    /// A connection on which nothing was said.
    pub fn plain(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        stream
    }

    pub fn connect(&self) -> StreamOwned<ClientConnection, TcpStream> {
        let name = ServerName::try_from("localhost").unwrap();
        let client = ClientConnection::new(Arc::clone(&self.config), name).unwrap();
        StreamOwned::new(client, self.plain())
    }

    /// Sends these bytes as they are and reads all that comes back.
    pub fn send(&self, text: &str) -> Answer {
        let mut stream = self.connect();
        // It may be refused before all is sent.
        let _ = stream.write_all(text.as_bytes());
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        answer_of(bytes)
    }

    /// A request with these lines in its head besides.
    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, lines: &str) -> Answer {
        let host = self.address;
        self.send(&format!(
            "{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{lines}\r\n"
        ))
    }
}

/// The one certificate with this SHA-256.
#[derive(Debug)]
struct Known {
    print: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Known {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let hash = Sha256::digest(leaf);
        let hash: Vec<_> = hash.iter().map(|byte| format!("{byte:02X}")).collect();
        match hash.join(":") == self.print {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(Error::General("another certificate".to_owned())),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        crypto::verify_tls12_signature(message, leaf, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        crypto::verify_tls13_signature(message, leaf, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}
