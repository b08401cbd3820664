//! COM1: a 16550 UART on vm-superio's model, at ports 0x3f8 to 0x3ff, IRQ 4.

use std::io::Write;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::serial::{NoEvents, SerialState as SuperioState};
use vm_superio::{Serial as Uart, Trigger};

use crate::bus::BusDevice;
use crate::interrupt::InterruptLine;
use crate::lock;

/// First I/O port.
pub const PORT: u64 = 0x3f8;
/// Number of I/O ports.
pub const PORTS: u64 = 8;
/// IOAPIC pin.
pub const IRQ: u8 = 4;

/// Saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Format of this struct: 1.
    pub version: u32,
    /// DLL, DLM, IER, IIR, LCR, LSR, MCR, MSR, SCR.
    pub registers: [u8; 9],
    /// Bytes received that the guest has not read.
    pub received: Vec<u8>,
}

/// Errors of the serial port.
#[derive(Debug, Error)]
pub enum Error {
    /// A saved state that does not fit.
    #[error("saved serial port state: {0}")]
    State(String),
    /// Input could not be given to the guest.
    #[error("serial input: {0}")]
    Input(String),
}

#[derive(Clone)]
struct Irq(Arc<dyn InterruptLine>);

impl Trigger for Irq {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.trigger()
    }
}

type Output = Box<dyn Write + Send>;

struct Port {
    uart: Option<Uart<Irq, NoEvents, Output>>,
}

/// The serial port. Registers are behind one mutex, the output is written with it held.
pub struct Serial {
    port: Mutex<Port>,
    irq: Irq,
}

impl Serial {
    /// A port whose bytes go to `output`.
    pub fn new(line: Arc<dyn InterruptLine>, output: Output) -> Arc<Self> {
        let irq = Irq(line);
        let uart = Uart::new(irq.clone(), output);
        Arc::new(Self {
            port: Mutex::new(Port { uart: Some(uart) }),
            irq,
        })
    }

    /// Gives input to the guest, as much as its FIFO holds; returns the number of bytes taken.
    pub fn enqueue_input(&self, bytes: &[u8]) -> Result<usize, Error> {
        match &mut lock(&self.port).uart {
            Some(uart) => {
                let room = bytes.len().min(uart.fifo_capacity());
                uart.enqueue_raw_bytes(&bytes[..room])
                    .map_err(|e| Error::Input(format!("{e:?}")))
            }
            None => Ok(0),
        }
    }

    /// Saved state.
    pub fn state(&self) -> SerialState {
        let port = lock(&self.port);
        let s = port.uart.as_ref().map(|u| u.state()).unwrap_or_default();
        let registers = [
            s.baud_divisor_low,
            s.baud_divisor_high,
            s.interrupt_enable,
            s.interrupt_identification,
            s.line_control,
            s.line_status,
            s.modem_control,
            s.modem_status,
            s.scratch,
        ];
        SerialState {
            version: 1,
            registers,
            received: s.in_buffer,
        }
    }

    /// Loads a saved state.
    pub fn set_state(&self, state: &SerialState) -> Result<(), Error> {
        if state.version != 1 {
            return Err(Error::State(format!("version {}", state.version)));
        }
        let [dll, dlm, ier, iir, lcr, lsr, mcr, msr, scr] = state.registers;
        let superio = SuperioState {
            baud_divisor_low: dll,
            baud_divisor_high: dlm,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch: scr,
            in_buffer: state.received.clone(),
        };
        // A state that vm-superio refuses must not cost the port its output, so it is tried on a throw-away port.
        let sink: Output = Box::new(std::io::sink());
        Uart::from_state(&superio, self.irq.clone(), NoEvents, sink).map_err(|e| Error::State(format!("{e:?}")))?;
        let mut port = lock(&self.port);
        if let Some(uart) = port.uart.take() {
            let restored = Uart::from_state(&superio, self.irq.clone(), NoEvents, uart.into_writer());
            port.uart = Some(restored.map_err(|e| Error::State(format!("{e:?}")))?);
        }
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Some(byte), Some(uart)) = (data.first_mut(), &mut lock(&self.port).uart) {
            *byte = uart.read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Some(byte), Some(uart)) = (data.first(), &mut lock(&self.port).uart)
            && let Err(e) = uart.write(offset as u8, *byte)
        {
            log::debug!("serial port write: {e:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoLine;

    impl InterruptLine for NoLine {
        fn trigger(&self) -> std::io::Result<()> {
            Ok(())
        }

        fn set_level(&self, _: bool) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).extend_from_slice(buf);
            Ok(buf.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_input_and_state() {
        let out = Sink::default();
        let serial = Serial::new(Arc::new(NoLine), Box::new(out.clone()));
        serial.write(0, b"A");
        assert_eq!(serial.enqueue_input(&[7; 100]).unwrap(), 64, "a FIFO of 64 bytes");
        let state = serial.state();
        let other = Serial::new(Arc::new(NoLine), Box::new(out.clone()));
        other.set_state(&state).unwrap();
        let mut byte = [0];
        other.read(0, &mut byte);
        assert_eq!(byte, [7]);
        other.write(0, b"B");
        assert_eq!(*lock(&out.0), b"AB");
        let hostile = SerialState {
            received: vec![0; 100_000],
            ..state
        };
        assert!(other.set_state(&hostile).is_err());
        other.write(0, b"C");
        assert_eq!(*lock(&out.0), b"ABC", "a refused state leaves the port alone");
    }
}
