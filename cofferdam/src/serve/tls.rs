//! The service's certificate: one that is given, or one that is made anew at each start.

use std::fmt::Write;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData};
use sha2::{Digest, Sha256};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::tokens::private_file;

/// Longest file of certificates or of a key, in bytes.
const MAX_PEM_BYTES: u64 = 1 << 20;

/// Certificates in a chain.
const MAX_CHAIN: usize = 16;

/// What of a key's mode is not to be there: a group of those who may read keys is usual.
const ALL_OTHERS: u32 = 0o007;

/// A certificate with its key, for those who connect.
pub struct Certificate {
    acceptor: TlsAcceptor,
    /// SHA-256 of the certificate.
    fingerprint: String,
    /// SHA-256 of the public key, as curl's `--pinnedpubkey` takes it; of one that was made here.
    pin: Option<String>,
}

impl Certificate {
    /// The one in these PEM files.
    ///
    /// # Errors
    /// They cannot be read, are none or do not belong together, or others may read the key.
    pub fn read(certificate: &Path, key: &Path) -> anyhow::Result<Self> {
        // Anybody may read it.
        let chain = private_file(certificate, MAX_PEM_BYTES, 0)
            .and_then(|bytes| chain(&bytes))
            .with_context(|| format!("cannot use the certificate {}", certificate.display()))?;
        let private = private_file(key, MAX_PEM_BYTES, ALL_OTHERS)
            .and_then(|bytes| {
                // What is wrong with it could have some of it.
                PrivateKeyDer::from_pem_slice(&bytes)
                    .map_err(|_| anyhow::anyhow!("it has no key in PEM"))
            })
            .with_context(|| format!("cannot use the key {}", key.display()))?;
        Self::of(chain, private, None).with_context(|| {
            let (certificate, key) = (certificate.display(), key.display());
            format!("cannot use the certificate {certificate} with the key {key}")
        })
    }

    /// A new one, which nobody but itself has signed, for this host as `address`. It is kept in
    /// memory alone.
    ///
    /// # Errors
    /// There are no random numbers.
    pub fn make(address: IpAddr) -> anyhow::Result<Self> {
        let made = || -> Result<_, rcgen::Error> {
            let mut names = vec!["localhost".to_owned()];
            if !address.is_unspecified() {
                names.push(address.to_string());
            }
            let mut params = CertificateParams::new(names)?;
            params.distinguished_name = DistinguishedName::new();
            let name = "cofferdam service, signed by itself";
            params.distinguished_name.push(DnType::CommonName, name);
            let key = KeyPair::generate()?;
            Ok((params.self_signed(&key)?, key))
        };
        let (certificate, key) = made().context("cannot make a certificate")?;
        let public = Sha256::digest(key.subject_public_key_info());
        let pin = format!("sha256//{}", STANDARD.encode(public));
        let private = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Self::of(vec![certificate.der().clone()], private, Some(pin))
    }

    fn of(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        pin: Option<String>,
    ) -> anyhow::Result<Self> {
        let leaf = chain.first().context("there is no certificate")?;
        let fingerprint = colons(&Sha256::digest(leaf));
        let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            fingerprint,
            pin,
        })
    }

    /// Speaks TLS with it.
    pub fn acceptor(&self) -> &TlsAcceptor {
        &self.acceptor
    }

    /// How to know it, for people.
    pub fn text(&self) -> String {
        let mut text = format!("SHA-256 of the certificate: {}\n", self.fingerprint);
        if let Some(pin) = &self.pin {
            // What is written to a string arrives.
            let _ = writeln!(text, "for curl: --insecure --pinnedpubkey {pin}");
        }
        text
    }
}

fn chain(pem: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem)
        .take(MAX_CHAIN + 1)
        .collect();
    let chain = chain.map_err(|_| anyhow::anyhow!("it is no PEM"))?;
    ensure!(!chain.is_empty(), "it has no certificate in PEM");
    ensure!(
        chain.len() <= MAX_CHAIN,
        "it has more than {MAX_CHAIN} certificates"
    );
    Ok(chain)
}

/// Bytes as people compare them.
fn colons(bytes: &[u8]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02X}")).collect();
    bytes.join(":")
}
