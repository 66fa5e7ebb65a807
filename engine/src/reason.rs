//! How an engine ends by its own choice: a reason in the REASON file, then the exit code.
//!
//! The file comes first because a supervisor that adopted this process cannot wait for it: an empty
//! file means crash.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use podtether_proto::exit::{EngineExit, ExitReason};

/// Why the engine ends; travels up to `main` as a value, so that nothing exits from below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ending {
    pub(crate) exit: EngineExit,
    /// One sentence for a person.
    pub(crate) reason: String,
}

impl Ending {
    pub(crate) fn new(exit: EngineExit, reason: impl Into<String>) -> Self {
        Self { exit, reason: reason.into() }
    }
}

/// The REASON file.
#[derive(Debug)]
pub(crate) struct ReasonFile(Option<File>);

impl ReasonFile {
    pub(crate) fn new(fd: Option<OwnedFd>) -> Self {
        Self(fd.map(File::from))
    }

    /// Writes the reason and gives the code to exit with.
    pub(crate) fn finish(self, ending: &Ending) -> ExitCode {
        let wrote = serde_json::to_vec(&ExitReason { exit: ending.exit, reason: ending.reason.clone() })
            .map_err(std::io::Error::other)
            .and_then(|json| self.0.map_or(Ok(()), |file| file.write_all_at(&json, 0)));
        if let Err(error) = wrote {
            tracing::error!(%error, "could not write the reason file; an adopting supervisor will take this for a crash");
        }
        let exit = ending.exit;
        if exit == EngineExit::Stopped {
            tracing::info!(code = exit.code(), reason = ending.reason, "engine ends");
        } else {
            tracing::error!(code = exit.code(), ?exit, reason = ending.reason, "engine ends");
        }
        ExitCode::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Seek as _};

    #[test]
    fn the_file_says_what_the_exit_code_says() {
        let mut file = tempfile::tempfile().unwrap();
        let reason = ReasonFile::new(Some(file.try_clone().unwrap().into()));
        let _code = reason.finish(&Ending::new(EngineExit::LinkLost, "the TUN is gone"));
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        let read: ExitReason = serde_json::from_str(&text).unwrap();
        assert_eq!(read.exit, EngineExit::LinkLost);
        assert_eq!(read.reason, "the TUN is gone");
    }
}
