//! The network interfaces of a driver.
//!
//! | module | what it is |
//! | --- | --- |
//! | `config` | one interface's configuration: understood from what programs in the guest print, and written as their command lines |
//! | `live` | all interfaces of a driver in a live guest: read before the driver goes, put back when it has come again |

pub mod config;
pub mod live;
