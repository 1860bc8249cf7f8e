//! The network, the store and the device as the daemon has them.
