//! Writes what the interfaces of its network namespace carry, in and out, into a file: the frames as they are, one
//! after the other.
//!
//! `capture --file PATH`; the commands are `stats` and `quit`. Linux only, and needs the right to open raw sockets.

use macula_peer_testkit::quic::Error;

#[cfg(target_os = "linux")]
fn main() -> Result<(), Error> {
    linux::capture()
}

#[cfg(not(target_os = "linux"))]
fn main() -> Result<(), Error> {
    Err("frames can be captured on Linux only".into())
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::io::{self, Read, Write};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use macula_peer_testkit::quic::Error;
    use macula_peer_testkit::{control, options::Options};
    use socket2::{Domain, Protocol, Socket, Type};

    /// `AF_PACKET` and `ETH_P_ALL` of Linux's headers.
    const PACKET: i32 = 17;
    const EVERY_PROTOCOL: u16 = 3;

    pub(super) fn capture() -> Result<(), Error> {
        const BUFFER: usize = 8 * 1024 * 1024;
        let options = Options::read(std::env::args().skip(1), &["--file"])?;
        let file = File::create(options.require::<String>("--file")?)?;
        let protocol = Protocol::from(i32::from(EVERY_PROTOCOL.to_be()));
        let socket = Socket::new(Domain::from(PACKET), Type::RAW, Some(protocol))?;
        socket.set_recv_buffer_size(BUFFER)?;
        let counters = Arc::new(Counters::default());
        let counted = counters.clone();
        thread::spawn(move || write_down(socket, file, &counted));
        control::serve(0, |command| (command == "stats").then(|| counters.term()))?;
        Ok(())
    }

    fn write_down(mut socket: Socket, mut file: File, counters: &Counters) -> io::Result<()> {
        // Segments that the card would cut are still one frame here.
        const LARGEST_FRAME: usize = 128 * 1024;
        let mut frame = vec![0; LARGEST_FRAME];
        loop {
            let length = socket.read(&mut frame)?;
            file.write_all(&frame[..length])?;
            counters.bytes.fetch_add(length as u64, Ordering::Relaxed);
            counters.frames.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[derive(Default)]
    struct Counters {
        frames: AtomicU64,
        bytes: AtomicU64,
    }

    impl Counters {
        fn term(&self) -> String {
            let counters = [("frames", &self.frames), ("bytes", &self.bytes)];
            control::term(counters.map(|(name, counter)| (name, counter.load(Ordering::Relaxed).to_string())))
        }
    }
}
