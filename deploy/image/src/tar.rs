//! Tar archives in which nothing depends on where and when they are made.

use std::io::{self, Write};

const BLOCK: usize = 512;

/// Writes an archive: files of root, dated 1970, in the order of the calls.
#[derive(Debug)]
pub(crate) struct Archive<W: Write> {
    out: W,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out }
    }

    /// A directory; `path` ends with `/`.
    pub(crate) fn directory(&mut self, path: &str) -> io::Result<()> {
        self.out.write_all(&header(path, b'5', 0o755, 0)?)
    }

    /// A regular file.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.out.write_all(&header(path, b'0', mode, content.len())?)?;
        self.out.write_all(content)?;
        let padding = content.len().next_multiple_of(BLOCK) - content.len();
        self.out.write_all(&[0; BLOCK][..padding])
    }

    /// Writes the end.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        Ok(self.out)
    }
}

/// A ustar header (POSIX.1-1988).
fn header(path: &str, kind: u8, mode: u32, size: usize) -> io::Result<[u8; BLOCK]> {
    let mut block = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    if path.len() > 100 {
        return Err(io::Error::other(format!("{path} is too long a name for an image")));
    }
    put(0, path.as_bytes());
    put(100, format!("{mode:07o}\0").as_bytes());
    put(108, b"0000000\x000000000\0");
    let size = format!("{size:011o}\0");
    if size.len() > 12 {
        return Err(io::Error::other(format!("{path} is too large for an image")));
    }
    put(124, size.as_bytes());
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(block)
}
