//! What a driver sees of the controller: link, interrupts, rings, self-test, reset.

mod driver;
mod link;
mod receive;
mod registers;
mod transmit;
