//! Results and errors, for people or as JSON.

use std::io::{self, Write};

use api::ClientError;
use serde::Serialize;

/// Prints a line on standard output. Ends the program quietly when nobody reads it any longer.
pub fn line(text: &str) {
    if let Err(e) = writeln!(io::stdout().lock(), "{text}") {
        let status = if e.kind() == io::ErrorKind::BrokenPipe { 0 } else { 1 };
        std::process::exit(status);
    }
}

/// Prints `value` as readable JSON.
pub fn json<T: Serialize>(value: &T) {
    line(&serde_json::to_string_pretty(value).unwrap_or_else(|e| e.to_string()));
}

/// A command that has nothing to tell is done.
pub fn done(as_json: bool) {
    if as_json {
        line(r#"{"result":"done"}"#);
    }
}

/// Prints an error on standard error.
pub fn error(e: &anyhow::Error, as_json: bool) {
    // Where standard error is gone as well, the exit status must do.
    let _ = if as_json {
        let code = e.downcast_ref::<ClientError>().map_or("client", code);
        let object = serde_json::json!({"code": code, "message": format!("{e:#}")});
        writeln!(io::stderr().lock(), "{object}")
    } else {
        writeln!(io::stderr().lock(), "ch-remote: {e:#}")
    };
}

fn code(e: &ClientError) -> &str {
    match e {
        ClientError::NoSocket(_) | ClientError::Refused(_) => "vmm_not_running",
        ClientError::Connect { .. } => "socket",
        ClientError::Timeout { .. } => "timeout",
        ClientError::Broken { .. } => "connection_broken",
        ClientError::BadAnswer { .. } => "bad_answer",
        ClientError::Api(e) => &e.code,
    }
}
