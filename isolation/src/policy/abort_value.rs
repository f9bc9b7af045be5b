//! What a call returns that was aborted.
//!
//! The caller has to take it for an ordinary failure of the driver. Where the kernel knows a
//! better answer than an error number, the operation is in the table; operations are recognised by
//! the names of their types, because stock modules say no more about a function.

use serde::Serialize;

use crate::guest::btf::{Btf, Function, Kind, TypeId};

/// `EIO`.
const EIO: i64 = 5;

/// Arguments that are passed in registers: `rdi`, `rsi`, `rdx`, `rcx`, `r8`, `r9`.
pub const REGISTER_ARGUMENTS: usize = 6;

/// What is left in `rax`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AbortValue {
    /// The function returns nothing.
    Nothing,
    /// This.
    Constant(i64),
    /// What the caller passed as this argument.
    Argument(usize),
    /// The address so many bytes into what the caller passed as this argument.
    Within(usize, u32),
}

impl AbortValue {
    /// The value for a call with these register arguments. For `Nothing` zero, which nobody reads.
    pub fn rax(self, arguments: &[u64; REGISTER_ARGUMENTS]) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Constant(value) => value as u64,
            Self::Argument(index) => arguments.get(index).copied().unwrap_or(0),
            Self::Within(index, offset) => match arguments.get(index) {
                Some(at) if *at != 0 => at.wrapping_add(offset.into()),
                _ => 0,
            },
        }
    }
}

/// The value, and what the caller makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct AbortReturn {
    /// The value.
    pub value: AbortValue,
    /// For reports.
    pub meaning: &'static str,
}

impl AbortReturn {
    /// For a function that nothing is known of: an error for most, and harmless for those that
    /// return nothing.
    pub const UNKNOWN: Self = Self {
        value: AbortValue::Constant(-EIO),
        meaning: "-EIO",
    };
}

/// By the name of the returned type, with the constant and its meaning. Values from
/// `include/linux/netdevice.h`, `irqreturn.h`, `blk_types.h`, `hrtimer.h`, `blk-mq.h`, `pci.h` and
/// `include/uapi/linux/eventpoll.h`.
const BY_RETURNED_TYPE: &[(&str, i64, &str)] = &[
    (
        "netdev_tx_t",
        0x10,
        "NETDEV_TX_BUSY: the packet is queued again",
    ),
    // Unhandled interrupts are counted, and the line is switched off when there were too many.
    (
        "irqreturn_t",
        1,
        "IRQ_HANDLED: a level that is still raised comes again",
    ),
    (
        "blk_status_t",
        10,
        "BLK_STS_IOERR: the request ends with an error",
    ),
    (
        "blk_eh_timer_return",
        1,
        "BLK_EH_RESET_TIMER: the request is given more time",
    ),
    ("hrtimer_restart", 0, "HRTIMER_NORESTART"),
    (
        "pci_ers_result_t",
        4,
        "PCI_ERS_RESULT_DISCONNECT: the device is given up",
    ),
    ("__poll_t", 8, "EPOLLERR"),
];

/// Structures to which pointers are returned that callers look at as possible errors (`IS_ERR`),
/// and follow if they are none: `mount`, `lookup`, `fh_to_dentry`, `d_automount`, `get_acl`
/// (include/linux/fs.h, exportfs.h, dcache.h).
const ERROR_POINTERS: &[&str] = &["dentry", "vfsmount", "posix_acl"];

/// What an aborted call of the function `name` returns; `None` if its type is not known, or no
/// value can be made of it.
pub fn abort_return_named(types: &Btf, name: &str) -> Option<AbortReturn> {
    if let Some(function) = types.find_function(name) {
        return abort_return(types, &function);
    }
    // The compiler's copies (`f.isra.0`) return what the function does, and have other parameters.
    let (original, _) = name.split_once('.')?;
    let value = abort_return(types, &types.find_function(original)?)?;
    let of_argument = matches!(
        value.value,
        AbortValue::Argument(_) | AbortValue::Within(..)
    );
    (!of_argument).then_some(value)
}

/// Whether the function `name` is one that the kernel gives packets to.
pub fn is_transmit_named(types: &Btf, name: &str) -> bool {
    let known = types.find_function(name);
    known.is_some_and(|function| is_transmit(types, &function))
}

/// What an aborted call of `function` returns; `None` if no value of its type can be made (a
/// structure returned by value).
pub fn abort_return(types: &Btf, function: &Function<'_>) -> Option<AbortReturn> {
    let constant = |value, meaning| {
        Some(AbortReturn {
            value: AbortValue::Constant(value),
            meaning,
        })
    };
    let names = types.names_of(function.returns);
    let known = BY_RETURNED_TYPE
        .iter()
        .find(|(name, ..)| names.contains(name));
    if let Some((_, value, meaning)) = known {
        return constant(*value, meaning);
    }
    // `ndo_fix_features`, `ndo_features_check`.
    if names.contains(&"netdev_features_t") {
        let same = |id: TypeId| types.names_of(id).contains(&"netdev_features_t");
        let given = function
            .params
            .iter()
            .take(REGISTER_ARGUMENTS)
            .position(|p| same(p.type_id));
        return Some(match given {
            Some(index) => AbortReturn {
                value: AbortValue::Argument(index),
                meaning: "the features that were asked for",
            },
            None => AbortReturn {
                value: AbortValue::Constant(0),
                meaning: "no features",
            },
        });
    }
    if polls_for_blocks(types, function) {
        return constant(0, "0: nothing is completed yet");
    }
    if is_napi_poll(types, function) {
        return Some(AbortReturn {
            value: AbortValue::Argument(1),
            meaning: "the whole budget: the device is polled again",
        });
    }
    match types.resolve(function.returns)?.1 {
        Kind::Void => Some(AbortReturn {
            value: AbortValue::Nothing,
            meaning: "nothing",
        }),
        Kind::Int { boolean: true, .. } => constant(0, "false"),
        Kind::Int {
            signed: true,
            bytes: 4 | 8,
            ..
        } => constant(-EIO, "-EIO"),
        Kind::Int { bytes: 1..=8, .. } => constant(0, "0"),
        Kind::Pointer(to) => {
            let names = types.names_of(to);
            if names.contains(&"net_device_stats")
                && let Some(value) = own_statistics(types, function)
            {
                return Some(value);
            }
            match ERROR_POINTERS.iter().any(|name| names.contains(name)) {
                true => constant(-EIO, "-EIO as a pointer"),
                false => constant(0, "NULL"),
            }
        }
        Kind::Enum { .. } => constant(0, "0, the first value"),
        _ => None,
    }
}

/// `struct net_device_stats *ndo_get_stats(struct net_device *)`: whoever calls it reads what it
/// returns (`dev_get_stats`, net/core/dev.c). Interfaces have some of their own.
fn own_statistics(types: &Btf, function: &Function<'_>) -> Option<AbortReturn> {
    let params = function.params.iter().take(REGISTER_ARGUMENTS);
    let pointees = params.map(|p| types.pointee(p.type_id));
    let (index, device) = pointees.enumerate().find_map(|(index, to)| {
        let names = types.names_of(to?);
        names.contains(&"net_device").then_some((index, to?))
    })?;
    let stats = types.find_member(types.resolve(device)?.0, "stats")?;
    Some(AbortReturn {
        value: AbortValue::Within(index, stats.bit_offset / 8),
        meaning: "the statistics that the interface itself has",
    })
}

/// `netdev_tx_t ndo_start_xmit(struct sk_buff *, struct net_device *)`: whoever calls it keeps the
/// packet when it returns `NETDEV_TX_BUSY`.
pub fn is_transmit(types: &Btf, function: &Function<'_>) -> bool {
    let names = |id| types.pointee(id).map(|id| types.names_of(id));
    let mut params = function.params.iter();
    let mut next_is = |name| {
        let names = params.next().and_then(|p| names(p.type_id));
        names.is_some_and(|names| names.contains(&name))
    };
    types.names_of(function.returns).contains(&"netdev_tx_t")
        && next_is("sk_buff")
        && next_is("net_device")
        && params.next().is_none()
}

/// `int poll(struct blk_mq_hw_ctx *, ...)` and
/// `int iopoll(struct kiocb *, struct io_comp_batch *, unsigned int)`, which return how many
/// requests have completed; told by the batch that the requests go to.
fn polls_for_blocks(types: &Btf, function: &Function<'_>) -> bool {
    let mut params = function.params.iter();
    params.any(|p| {
        let to = types.pointee(p.type_id).map(|id| types.names_of(id));
        to.is_some_and(|names| names.contains(&"io_comp_batch"))
    })
}

/// `int poll(struct napi_struct *, int budget)`. With less than the budget the kernel would take
/// the device for idle and never poll it again.
fn is_napi_poll(types: &Btf, function: &Function<'_>) -> bool {
    let mut params = function.params.iter();
    let napi = params.next().and_then(|p| types.pointee(p.type_id));
    let (budget, rest) = (params.next(), params.next());
    let is_int = |id| {
        matches!(
            types.resolve(id),
            Some((
                _,
                Kind::Int {
                    signed: true,
                    bytes: 4,
                    ..
                }
            ))
        )
    };
    napi.is_some_and(|id| types.names_of(id).contains(&"napi_struct"))
        && budget.is_some_and(|p| is_int(p.type_id))
        && rest.is_none()
        && is_int(function.returns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::btf::encode::Encoder;

    /// The abort value of a function of these types, made by `build`.
    fn of(build: impl FnOnce(&mut Encoder) -> (TypeId, Vec<TypeId>)) -> Option<AbortReturn> {
        let mut e = Encoder::new(None);
        let (returns, params) = build(&mut e);
        let params: Vec<_> = params.into_iter().map(|id| ("p", id)).collect();
        e.function("f", returns, &params);
        let types = Btf::parse(&e.bytes(), None).unwrap();
        abort_return(&types, &types.find_function("f").unwrap())
    }

    fn value(build: impl FnOnce(&mut Encoder) -> (TypeId, Vec<TypeId>)) -> AbortValue {
        of(build).unwrap().value
    }

    /// `cp_get_stats` of `8139cp`, whose caller follows whatever it returns.
    #[test]
    fn statistics_are_those_that_the_interface_has() {
        let stats = |e: &mut Encoder, members: &[(&str, TypeId, u32)]| {
            let stats = e.structure("net_device_stats", 184, &[]);
            let members: Vec<_> = members
                .iter()
                .map(|(name, _, at)| (*name, stats, *at))
                .collect();
            let device = e.structure("net_device", 512, &members);
            (e.pointer(stats), vec![e.pointer(device)])
        };
        let has = value(|e| stats(e, &[("stats", TypeId::VOID, 0x124)]));
        assert_eq!(has, AbortValue::Within(0, 0x124));
        assert_eq!(has.rax(&[0x1000, 0, 0, 0, 0, 0]), 0x1124);
        assert_eq!(has.rax(&[0; 6]), 0);
        assert_eq!(value(|e| stats(e, &[])), AbortValue::Constant(0));
    }

    #[test]
    fn values_fit_the_returned_type() {
        use AbortValue::{Constant, Nothing};
        assert_eq!(value(|_| (TypeId::VOID, vec![])), Nothing);
        assert_eq!(value(|e| (e.int("int", 4, 1), vec![])), Constant(-5));
        assert_eq!(value(|e| (e.int("long", 8, 1), vec![])), Constant(-5));
        assert_eq!(
            value(|e| (e.int("unsigned int", 4, 0), vec![])),
            Constant(0)
        );
        assert_eq!(value(|e| (e.int("_Bool", 1, 4), vec![])), Constant(0));
        assert_eq!(value(|e| (e.pointer(TypeId::VOID), vec![])), Constant(0));
        let pointer = |e: &mut Encoder, to: &str| {
            let to = e.structure(to, 16, &[]);
            e.pointer(to)
        };
        // Who mounts a file system follows anything that is no error.
        assert_eq!(value(|e| (pointer(e, "dentry"), vec![])), Constant(-5));
        assert_eq!(value(|e| (pointer(e, "Qdisc"), vec![])), Constant(0));
        assert_eq!(of(|e| (e.structure("pair", 16, &[]), vec![])), None);
        let typedef = |e: &mut Encoder, name: &str| {
            let int = e.int("int", 4, 1);
            e.typedef(name, int)
        };
        assert_eq!(
            value(|e| (typedef(e, "netdev_tx_t"), vec![])),
            Constant(0x10)
        );
        assert_eq!(value(|e| (typedef(e, "irqreturn_t"), vec![])), Constant(1));
        assert_eq!(value(|e| (typedef(e, "some_t"), vec![])), Constant(-5));
        let arguments = [7; REGISTER_ARGUMENTS];
        assert_eq!(Constant(-5).rax(&arguments) as i64, -5);
    }

    #[test]
    fn only_functions_with_a_type_have_a_value() {
        let mut e = Encoder::new(None);
        let int = e.int("int", 4, 1);
        e.function("my_open", int, &[]);
        let types = Btf::parse(&e.bytes(), None).unwrap();
        let known = abort_return_named(&types, "my_open").unwrap();
        assert_eq!(known.value, AbortValue::Constant(-5));
        assert_eq!(abort_return_named(&types, "my_close"), None);
        assert!(!is_transmit_named(&types, "my_open.isra.0"));
    }

    #[test]
    fn a_poll_that_failed_is_polled_again() {
        let poll = value(|e| {
            let int = e.int("int", 4, 1);
            let napi = e.structure("napi_struct", 400, &[]);
            (int, vec![e.pointer(napi), int])
        });
        assert_eq!(poll, AbortValue::Argument(1));
        assert_eq!(poll.rax(&[1, 64, 3, 4, 5, 6]), 64);
        let other = value(|e| {
            let int = e.int("int", 4, 1);
            let device = e.structure("net_device", 400, &[]);
            (int, vec![e.pointer(device), int])
        });
        assert_eq!(other, AbortValue::Constant(-5));
    }

    #[test]
    fn the_compilers_copies_return_what_their_original_does() {
        let mut e = Encoder::new(None);
        let int = e.int("int", 4, 1);
        let napi = e.structure("napi_struct", 400, &[]);
        let napi = e.pointer(napi);
        e.function("find", napi, &[("p", int)]);
        e.function("poll", int, &[("napi", napi), ("budget", int)]);
        let types = Btf::parse(&e.bytes(), None).unwrap();
        let value = |name| abort_return_named(&types, name).map(|known| known.value);
        assert_eq!(value("find.isra.0"), Some(AbortValue::Constant(0)));
        assert_eq!(value("poll"), Some(AbortValue::Argument(1)));
        assert_eq!(value("poll.constprop.0"), None, "its arguments are others");
        assert_eq!(value("other.isra.0"), None);
    }

    #[test]
    fn a_poll_for_block_requests_never_counts_less_than_none() {
        let poll = value(|e| {
            let int = e.int("int", 4, 1);
            let queue = e.structure("blk_mq_hw_ctx", 400, &[]);
            let batch = e.structure("io_comp_batch", 24, &[]);
            (int, vec![e.pointer(queue), e.pointer(batch)])
        });
        assert_eq!(poll, AbortValue::Constant(0));
    }

    #[test]
    fn a_transmit_function_is_told_by_its_types() {
        let is = |returns: &str, params: &[&str]| {
            let mut e = Encoder::new(None);
            let int = e.int("int", 4, 1);
            let returns = e.typedef(returns, int);
            let params: Vec<_> = params
                .iter()
                .map(|name| {
                    let of = e.structure(name, 64, &[]);
                    ("p", e.pointer(of))
                })
                .collect();
            e.function("f", returns, &params);
            let types = Btf::parse(&e.bytes(), None).unwrap();
            is_transmit(&types, &types.find_function("f").unwrap())
        };
        assert!(is("netdev_tx_t", &["sk_buff", "net_device"]));
        assert!(!is("irqreturn_t", &["sk_buff", "net_device"]));
        assert!(!is("netdev_tx_t", &["sk_buff", "e1000_tx_ring"]));
        assert!(!is("netdev_tx_t", &["sk_buff"]));
        assert!(!is("netdev_tx_t", &["sk_buff", "net_device", "ring"]));
    }

    #[test]
    fn features_are_returned_as_asked_for() {
        let fix = value(|e| {
            let device = e.structure("net_device", 400, &[]);
            let word = e.int("u64", 8, 0);
            let features = e.typedef("netdev_features_t", word);
            (features, vec![e.pointer(device), features])
        });
        assert_eq!(fix, AbortValue::Argument(1));
    }
}
