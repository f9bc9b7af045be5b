//! Interrupt delivery by KVM: level-triggered lines into the in-kernel I/O APIC and
//! message-signalled vectors by irqfd.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use devices::irq::{IrqLine, MsiMessage, MsiVectors};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::Error;
use crate::layout::IO_APIC_PINS;

/// One input of the I/O APIC, shared by any number of devices: asserted while one of them asserts it.
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
}

impl LineInput {
    pub fn new(gsi: Arc<Gsi>) -> Self {
        Self {
            gsi,
            level: AtomicBool::new(false),
        }
    }
}

impl IrqLine for LineInput {
    fn set_level(&self, asserted: bool) {
        if self.level.swap(asserted, Ordering::AcqRel) != asserted {
            self.gsi.change(asserted);
        }
    }
}

/// KVM's table of what each GSI does: the interrupt controllers' pins as after `KVM_CREATE_IRQCHIP`,
/// and message-signalled vectors behind them.
pub(crate) struct GsiRouting {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

struct Table {
    messages: BTreeMap<u32, MsiMessage>,
    next_gsi: u32,
}

impl GsiRouting {
    pub fn new(vm: Arc<VmFd>) -> Self {
        let table = Table {
            messages: BTreeMap::new(),
            next_gsi: IO_APIC_PINS,
        };
        Self {
            vm,
            table: Mutex::new(table),
        }
    }

    /// Vectors for one function, routed to nowhere.
    pub fn vectors(self: &Arc<Self>, count: u16) -> Result<MsiGroup, Error> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        // The pins of the interrupt controllers take entries of the table too.
        let end = table.next_gsi + u32::from(count);
        if end as usize + 16 > KVM_MAX_IRQ_ROUTES {
            return Err(Error::TooManyVectors);
        }
        let mut vectors = Vec::with_capacity(usize::from(count));
        for gsi in table.next_gsi..end {
            let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| Error::Host {
                what: "create an eventfd",
                source,
            })?;
            self.vm
                .register_irqfd(&event, gsi)
                .map_err(|source| Error::Kvm {
                    what: "register an irqfd",
                    source,
                })?;
            vectors.push(Vector {
                gsi,
                event,
                routed: AtomicBool::new(false),
            });
        }
        table.next_gsi = end;
        Ok(MsiGroup {
            routing: self.clone(),
            vectors,
        })
    }

    fn route(&self, gsi: u32, message: Option<MsiMessage>) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let previous = match message {
            Some(message) => table.messages.insert(gsi, message),
            None => table.messages.remove(&gsi),
        };
        if previous == message {
            return;
        }
        let entries = entries(&table.messages);
        let result = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| format!("{error:?}"))
            .and_then(|table| self.vm.set_gsi_routing(&table).map_err(|e| e.to_string()));
        if let Err(error) = result {
            tracing::error!(%error, gsi, "message-signalled interrupt not routed");
        }
    }
}

fn entries(messages: &BTreeMap<u32, MsiMessage>) -> Vec<kvm_irq_routing_entry> {
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
    let message = messages
        .iter()
        .map(|(&gsi, message)| kvm_irq_routing_entry {
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
    routed: AtomicBool,
}

/// The vectors of one function.
pub(crate) struct MsiGroup {
    routing: Arc<GsiRouting>,
    vectors: Vec<Vector>,
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
        vector.routed.store(message.is_some(), Ordering::Release);
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
}
