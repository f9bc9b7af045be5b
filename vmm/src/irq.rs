//! Interrupt delivery by KVM: level-triggered lines into the in-kernel I/O APIC and
//! message-signalled vectors by irqfd.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::irq::{IrqLine, LineEvents, MsiMessage, MsiVectors};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::{Error, StateError};
use crate::layout::IO_APIC_PINS;

/// One input of the I/O APIC, shared by any number of devices: asserted while one of them asserts
/// it.
pub(crate) struct Gsi {
    vm: Arc<VmFd>,
    number: u32,
    asserted_by: Mutex<u32>,
}

impl Gsi {
    pub fn new(vm: Arc<VmFd>, number: u32) -> Self {
        Self {
            vm,
            number,
            asserted_by: Mutex::new(0),
        }
    }

    fn change(&self, asserted: bool) {
        let mut count = self
            .asserted_by
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *count = if asserted {
            count.saturating_add(1)
        } else {
            count.saturating_sub(1)
        };
        let edge = matches!((asserted, *count), (true, 1) | (false, 0));
        if edge && let Err(error) = self.vm.set_irq_line(self.number, asserted) {
            // Only possible if the line does not exist, and all of ours do.
            tracing::error!(%error, gsi = self.number, "interrupt lost");
        }
    }
}

/// One device's connection to a shared line.
pub(crate) struct LineInput {
    gsi: Arc<Gsi>,
    level: AtomicBool,
    /// Where somebody outside drives the line too. KVM keeps its level apart from that of all
    /// [`Gsi::change`].
    outside: Mutex<Option<LineEvents>>,
}

impl LineInput {
    pub fn new(gsi: Arc<Gsi>) -> Self {
        Self {
            gsi,
            level: AtomicBool::new(false),
            outside: Mutex::new(None),
        }
    }

    fn connect_outside(&self) -> Result<LineEvents, Error> {
        let event = || {
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| Error::Host {
                what: "create an eventfd",
                source,
            })
        };
        let mut outside = self.outside.lock().unwrap_or_else(PoisonError::into_inner);
        let events = match outside.take() {
            Some(events) => events,
            None => {
                let (trigger, unmask) = (event()?, event()?);
                self.gsi
                    .vm
                    .register_irqfd_with_resample(&trigger, &unmask, self.gsi.number)
                    .map_err(Error::kvm("register an irqfd"))?;
                LineEvents { trigger, unmask }
            }
        };
        let events = outside.insert(events);
        let copy = |event: &EventFd| {
            event.try_clone().map_err(|source| Error::Host {
                what: "copy an eventfd",
                source,
            })
        };
        Ok(LineEvents {
            trigger: copy(&events.trigger)?,
            unmask: copy(&events.unmask)?,
        })
    }
}

impl Drop for LineInput {
    /// A device that is gone asserts nothing.
    fn drop(&mut self) {
        self.set_level(false);
        let outside = self.outside.get_mut();
        let Some(events) = outside.unwrap_or_else(PoisonError::into_inner) else {
            return;
        };
        // KVM deasserts what was asserted by it.
        if let Err(error) = self
            .gsi
            .vm
            .unregister_irqfd(&events.trigger, self.gsi.number)
        {
            tracing::error!(%error, gsi = self.gsi.number, "irqfd not taken back");
        }
    }
}

impl IrqLine for LineInput {
    fn set_level(&self, asserted: bool) {
        if self.level.swap(asserted, Ordering::AcqRel) != asserted {
            self.gsi.change(asserted);
        }
    }

    fn events(&self) -> Option<LineEvents> {
        self.connect_outside()
            .inspect_err(|error| tracing::error!(%error, gsi = self.gsi.number, "no line"))
            .ok()
    }
}

/// KVM's table of what each GSI does: the interrupt controllers' pins as after
/// `KVM_CREATE_IRQCHIP`, and message-signalled vectors behind them.
pub(crate) struct GsiRouting {
    vm: Arc<VmFd>,
    table: Mutex<BTreeMap<u32, Routed>>,
}

/// Where a vector of a device goes.
struct Routed {
    message: Option<MsiMessage>,
    /// The same for its device, which looks at it before each message.
    flag: Arc<AtomicBool>,
}

/// Where a message-signalled vector goes, as a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Route {
    gsi: u32,
    address: u64,
    data: u32,
}

/// First GSI of vectors.
const FIRST_VECTOR: u32 = IO_APIC_PINS;
/// First GSI that no vector can have: the pins of the interrupt controllers take entries of the
/// table too.
const VECTORS_END: u32 = KVM_MAX_IRQ_ROUTES as u32 - 16;

impl GsiRouting {
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            table: Mutex::new(BTreeMap::new()),
        }
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<u32, Routed>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Vectors for one function, routed to nowhere. They are free again when the group is dropped.
    pub fn vectors(self: &Arc<Self>, count: u16) -> Result<MsiGroup, Error> {
        let mut table = self.table();
        let free: Vec<u32> = (FIRST_VECTOR..VECTORS_END)
            .filter(|gsi| !table.contains_key(gsi))
            .take(usize::from(count))
            .collect();
        if free.len() < usize::from(count) {
            return Err(Error::TooManyVectors);
        }
        let mut group = MsiGroup {
            routing: self.clone(),
            vectors: Vec::with_capacity(free.len()),
        };
        for gsi in free {
            let vector = self.vector(gsi);
            match vector {
                Ok(vector) => {
                    let flag = vector.routed.clone();
                    table.insert(
                        gsi,
                        Routed {
                            message: None,
                            flag,
                        },
                    );
                    group.vectors.push(vector);
                }
                Err(error) => {
                    // The group takes its vectors out of the table.
                    drop(table);
                    return Err(error);
                }
            }
        }
        Ok(group)
    }

    fn vector(&self, gsi: u32) -> Result<Vector, Error> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| Error::Host {
            what: "create an eventfd",
            source,
        })?;
        self.vm
            .register_irqfd(&event, gsi)
            .map_err(Error::kvm("register an irqfd"))?;
        Ok(Vector {
            gsi,
            event,
            routed: Arc::new(AtomicBool::new(false)),
        })
    }

    fn route(&self, gsi: u32, message: Option<MsiMessage>) {
        let mut table = self.table();
        let Some(routed) = table.get_mut(&gsi) else {
            return;
        };
        routed.flag.store(message.is_some(), Ordering::Release);
        if std::mem::replace(&mut routed.message, message) == message {
            return;
        }
        if let Err(error) = self.tell_kvm(&table) {
            tracing::error!(%error, gsi, "message-signalled interrupt not routed");
        }
    }

    fn tell_kvm(&self, table: &BTreeMap<u32, Routed>) -> Result<(), Error> {
        let entries = entries(table);
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|_| Error::TooManyVectors)?;
        self.vm
            .set_gsi_routing(&routing)
            .map_err(Error::kvm("route interrupts"))
    }

    fn release(&self, vectors: &[Vector]) {
        let mut table = self.table();
        let mut changed = false;
        for vector in vectors {
            if let Err(error) = self.vm.unregister_irqfd(&vector.event, vector.gsi) {
                tracing::error!(%error, gsi = vector.gsi, "irqfd not taken back");
            }
            changed |= table
                .remove(&vector.gsi)
                .is_some_and(|routed| routed.message.is_some());
        }
        if changed && let Err(error) = self.tell_kvm(&table) {
            tracing::error!(%error, "routes of a device that is gone stay");
        }
    }

    /// Routes of all vectors that go anywhere.
    pub fn save(&self) -> Vec<Route> {
        let route = |(&gsi, routed): (&u32, &Routed)| {
            let message = routed.message?;
            Some(Route {
                gsi,
                address: message.address,
                data: message.data,
            })
        };
        self.table().iter().filter_map(route).collect()
    }

    /// Routes vectors as `routes` says, and all others to nowhere. The devices are those that were
    /// there when it was taken, made in the same order.
    pub fn restore(&self, routes: &[Route]) -> Result<(), Error> {
        let mut table = self.table();
        if let Some(unknown) = routes.iter().find(|route| !table.contains_key(&route.gsi)) {
            return Err(StateError::Route(unknown.gsi).into());
        }
        let wanted: BTreeMap<u32, MsiMessage> = routes
            .iter()
            .map(|route| {
                let message = MsiMessage {
                    address: route.address,
                    data: route.data,
                };
                (route.gsi, message)
            })
            .collect();
        let mut changed = false;
        for (gsi, routed) in table.iter_mut() {
            let message = wanted.get(gsi).copied();
            changed |= std::mem::replace(&mut routed.message, message) != message;
            routed.flag.store(message.is_some(), Ordering::Release);
        }
        match changed {
            // KVM waits for all its readers.
            true => self.tell_kvm(&table),
            false => Ok(()),
        }
    }
}

fn entries(table: &BTreeMap<u32, Routed>) -> Vec<kvm_irq_routing_entry> {
    let pin = |gsi: u32, irqchip: u32, pin: u32| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    let master = (0..8).map(|gsi| pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
    let slave = (8..16).map(|gsi| pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8));
    let io_apic = (0..IO_APIC_PINS).map(|gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    let message = table
        .iter()
        .filter_map(|(&gsi, routed)| Some((gsi, routed.message?)))
        .map(|(gsi, message)| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: message.address as u32,
                    address_hi: (message.address >> 32) as u32,
                    data: message.data,
                    ..Default::default()
                },
            },
            ..Default::default()
        });
    master.chain(slave).chain(io_apic).chain(message).collect()
}

struct Vector {
    gsi: u32,
    event: EventFd,
    routed: Arc<AtomicBool>,
}

/// The vectors of one function.
pub(crate) struct MsiGroup {
    routing: Arc<GsiRouting>,
    vectors: Vec<Vector>,
}

impl Drop for MsiGroup {
    fn drop(&mut self) {
        self.routing.release(&self.vectors);
    }
}

impl MsiVectors for MsiGroup {
    fn count(&self) -> u16 {
        // Made from a `u16`.
        self.vectors.len() as u16
    }

    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        let Some(vector) = self.vectors.get(usize::from(vector)) else {
            return;
        };
        self.routing.route(vector.gsi, message);
    }

    fn trigger(&self, vector: u16) {
        let Some(vector) = self.vectors.get(usize::from(vector)) else {
            return;
        };
        if vector.routed.load(Ordering::Acquire)
            && let Err(error) = vector.event.write(1)
        {
            // The counter is full only if KVM does not consume it, and then one more is no news.
            tracing::debug!(%error, "interrupt message coalesced");
        }
    }

    fn event(&self, vector: u16) -> Option<EventFd> {
        let vector = self.vectors.get(usize::from(vector))?;
        vector.event.try_clone().ok()
    }
}
