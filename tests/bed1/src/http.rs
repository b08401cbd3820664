//! The smallest HTTP client that the REST API needs: one request per connection. Starting ch-remote for every poll would
//! load the machine that is being measured.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Longest silence of the API.
const LIMIT: Duration = Duration::from_secs(30);
/// Largest answer.
const MAX_ANSWER: usize = 16 << 20;

/// An answer of the API.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Body.
    pub body: String,
}

/// Sends a request to `/api/v1/ENDPOINT` and returns the answer.
pub fn call(socket: &Path, method: &str, endpoint: &str, body: Option<&str>) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let mut request = format!("{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
    if let Some(body) = body {
        request.push_str(&format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ));
    } else {
        request.push_str("\r\n");
    }
    stream.write_all(request.as_bytes()).context("send the request")?;
    read_answer(&mut stream)
}

fn read_answer(stream: &mut impl Read) -> Result<Answer> {
    let mut bytes = Vec::new();
    let mut wanted = None;
    let mut chunk = [0; 4096];
    loop {
        if let Some((head_len, body_len)) = wanted
            && bytes.len() >= head_len + body_len
        {
            let head = String::from_utf8_lossy(&bytes[..head_len]).into_owned();
            let status = head
                .split(' ')
                .nth(1)
                .and_then(|word| word.parse().ok())
                .context("no HTTP status")?;
            let body = String::from_utf8_lossy(&bytes[head_len..head_len + body_len]).into_owned();
            return Ok(Answer { status, body });
        }
        if bytes.len() > MAX_ANSWER {
            bail!("an answer larger than {MAX_ANSWER} bytes");
        }
        let n = stream.read(&mut chunk).context("read the answer")?;
        if n == 0 {
            bail!("the API closed the connection before its answer was whole");
        }
        bytes.extend_from_slice(&chunk[..n]);
        if wanted.is_none()
            && let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n")
        {
            wanted = Some((end + 4, content_length(&String::from_utf8_lossy(&bytes[..end]))));
        }
    }
}

fn content_length(head: &str) -> usize {
    let line = head
        .lines()
        .find(|line| line.to_ascii_lowercase().starts_with("content-length:"));
    line.and_then(|line| line.split(':').nth(1)?.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_with_and_without_body() {
        let mut text = &b"HTTP/1.1 200 \r\nServer: x\r\nContent-length: 5\r\n\r\nhello"[..];
        let answer = read_answer(&mut text).unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (200, "hello"));
        let mut text = &b"HTTP/1.1 204 No Content\r\n\r\n"[..];
        assert_eq!(read_answer(&mut text).unwrap().status, 204);
        let mut cut = &b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhel"[..];
        assert!(read_answer(&mut cut).is_err());
    }
}
