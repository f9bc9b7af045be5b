//! What a driver sees of the controller: link, interrupts, rings, self-test, reset.

mod by_registers;
mod driver;
mod event_loop;
mod histories;
mod link;
mod model;
mod offload;
mod receive;
mod registers;
mod shared;
mod state;
mod transmit;
