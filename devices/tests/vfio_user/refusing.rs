//! A card that does not take a state that it is given, as where a rewind fails half-way: its server
//! is in a state then from which nothing goes on.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use devices::pci::bus::SharedFunction;
use devices::pci::{BarIndex, BarRange, BarSize, PciFunction};
use devices::state::{Form, Part, StateError};

use crate::function::{frame, open, received, send};
use crate::support::{Host, Machine};

/// A function that takes no state while it is told so, and has no registers in memory.
pub struct Refusing {
    pub inner: SharedFunction,
    pub refuses: Arc<AtomicBool>,
}

impl PciFunction for Refusing {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.inner.lock().unwrap().config_read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.inner.lock().unwrap().config_write(offset, data);
    }

    fn decoded(&self) -> Vec<BarRange> {
        self.inner.lock().unwrap().decoded()
    }

    fn bars(&self) -> Vec<BarSize> {
        self.inner.lock().unwrap().bars()
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        self.inner.lock().unwrap().bar_read(bar, offset, data);
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        self.inner.lock().unwrap().bar_write(bar, offset, data);
    }

    fn reset(&mut self) {
        self.inner.lock().unwrap().reset();
    }

    fn save(&self) -> Result<Part, StateError> {
        self.inner.lock().unwrap().save()
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        if self.refuses.load(Ordering::Relaxed) {
            let form = Form {
                kind: "a card that refuses",
                version: 1,
            };
            return Err(form.does_not_fit("it refuses"));
        }
        self.inner.lock().unwrap().restore(state)
    }

    fn gives_state(&self) -> bool {
        self.inner.lock().unwrap().gives_state()
    }
}

#[test]
fn a_card_whose_server_does_not_have_it_go_on_is_gone_until_it_is_attached_anew() {
    let refuses = Arc::new(AtomicBool::new(false));
    let mut host = Host::new("e1000");
    host.offered.function = Arc::new(Mutex::new(Refusing {
        inner: host.offered.function.clone(),
        refuses: refuses.clone(),
    }));
    let (machine, served) = Machine::on(&host);
    open(&machine);
    let mut nic = machine.nic.lock().unwrap();
    nic.stop().unwrap();
    let state = nic.save().unwrap();
    refuses.store(true, Ordering::Relaxed);
    nic.restore(&state).unwrap_err();
    nic.go_on();
    // It would refuse each access from here on.
    assert!(!nic.is_connected());
    let mut ids = [0; 4];
    nic.config_read(0, &mut ids);
    assert_eq!(ids, [0xff; 4]);
    served.gone();
    refuses.store(false, Ordering::Relaxed);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let _served = host.serve(theirs);
    nic.reconnect(ours).unwrap();
    nic.stop().unwrap();
    nic.restore(&state).unwrap();
    nic.go_on();
    drop(nic);
    send(&machine, 0, &frame(1));
    assert_eq!(host.sent(), frame(1));
    host.deliver(&frame(2));
    assert_eq!(received(&machine, 0), frame(2));
}
