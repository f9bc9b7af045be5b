//! Where a PCI function of the host is.

use std::fmt;
use std::str::FromStr;

/// Domain, bus, device and function, as Linux writes them: `0000:00:02.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// No address of a PCI function.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no PCI address: give DOMAIN:BUS:DEVICE.FUNCTION, such as 0000:00:02.0")]
pub struct AddressError(String);

/// Device numbers of a bus, and functions of a device.
const DEVICES: u8 = 32;
const FUNCTIONS: u8 = 8;

/// A number of `digits` hexadecimal digits.
fn hexadecimal(text: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u32> {
    let usable = digits.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    usable.then(|| u32::from_str_radix(text, 16).ok())?
}

impl FromStr for PciAddress {
    type Err = AddressError;

    /// The domain may be left out: it is 0 then.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let parse = || {
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
            // Domains that the host makes itself, as for VMD, have more than four digits.
            let address = Self {
                domain: hexadecimal(domain, 1..=8)?,
                bus: u8::try_from(hexadecimal(bus, 2..=2)?).ok()?,
                device: u8::try_from(hexadecimal(device, 2..=2)?).ok()?,
                function: u8::try_from(hexadecimal(function, 1..=1)?).ok()?,
            };
            (address.device < DEVICES && address.function < FUNCTIONS).then_some(address)
        };
        parse().ok_or_else(|| AddressError(text.to_owned()))
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_linux_writes_them() {
        for (text, written) in [
            ("0000:00:02.0", "0000:00:02.0"),
            ("3b:1f.7", "0000:3b:1f.7"),
            ("0001:FF:0a.1", "0001:ff:0a.1"),
            ("10000:e1:00.0", "10000:e1:00.0"),
        ] {
            let address: PciAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), written);
            assert_eq!(written.parse::<PciAddress>(), Ok(address));
        }
    }

    #[test]
    fn what_could_be_a_path_or_no_function_is_refused() {
        for text in [
            "",
            "0000:00:02",
            "0000:00:20.0",
            "0000:00:02.8",
            "0000:00:2.0",
            "../00:02.0",
            "0000:00:02.0/",
            "0000:+0:02.0",
            "0:0:0:00:02.0",
            "123456789:00:02.0",
            "0000:00:02.0\n",
        ] {
            text.parse::<PciAddress>().unwrap_err();
        }
    }
}
