//! What an aborted call returns.
//!
//! The value has to be one that the caller handles as a failure. For operations with a convention
//! of their own it is looked up by the name's ending, which drivers of Linux keep to; anything else
//! gets `-EIO`, which is also harmless in RAX for functions that return nothing.

/// `NETDEV_TX_BUSY` of `include/linux/netdevice.h`: the stack keeps the packet and tries again.
const NETDEV_TX_BUSY: u64 = 0x10;
/// `IRQ_HANDLED` of `include/linux/irqreturn.h`: the line is not shut off as a spurious one.
const IRQ_HANDLED: u64 = 1;
const EIO: i64 = 5;

/// RAX of an aborted call of the function `name`, whose second argument was `second`.
pub fn abort_value(name: &str, second: u64) -> u64 {
    let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    if ends(&["_xmit", "_xmit_frame", "_start_xmit", "_tx_frame"]) {
        NETDEV_TX_BUSY
    } else if ends(&["_intr", "_irq", "_interrupt", "_isr", "_irq_handler"]) {
        IRQ_HANDLED
    } else if ends(&["_poll", "_clean", "_napi"]) {
        // The whole budget: NAPI polls again. Anything less says that polling was ended, which would
        // leave the interface deaf.
        second
    } else {
        (-EIO) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_with_a_convention_of_their_own_fail_by_it() {
        assert_eq!(abort_value("dummy_xmit", 0), NETDEV_TX_BUSY);
        assert_eq!(abort_value("e1000_xmit_frame", 0), NETDEV_TX_BUSY);
        assert_eq!(abort_value("e1000_intr", 0), IRQ_HANDLED);
        assert_eq!(abort_value("e1000_clean", 64), 64);
        assert_eq!(abort_value("e1000_set_ringparam", 0) as i64, -5);
    }
}
