//! The parts of the test guest that need no machine, so that their tests run on the host.
#![cfg_attr(not(test), no_std)]
