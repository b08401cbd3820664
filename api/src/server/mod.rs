//! The HTTP/1.1 server on a Unix socket.
//!
//! One thread looks after all connections (hyper on a current-thread runtime); each request is served on a
//! thread of its own, so that neither a long request nor a client that stalls holds up the others. Bounds: [`MAX_CONNECTIONS`],
//! [`MAX_BODY`], [`HEAD_TIME`], [`BODY_TIME`].
//!
//! * [`socket`]: the listening socket and its file; [`endpoints`]: from path and body to a request.

pub mod endpoints;
pub mod socket;

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use sandbox::ThreadKind;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot, watch};

use crate::service::{ApiError, ErrorBody, Request, Response, VmmService};
pub use socket::{ApiSocket, SocketError};

/// Connections served at the same time; further ones wait for their turn.
pub const MAX_CONNECTIONS: usize = 128;
/// Requests served at the same time; further ones wait for their turn.
pub const MAX_WORKERS: usize = 32;
/// Longest request body in bytes.
pub const MAX_BODY: usize = 4 << 20;
/// A request's head must have come within this time; idle connections end after it.
pub const HEAD_TIME: Duration = Duration::from_secs(30);
/// A request's body must have come within this time after its head.
pub const BODY_TIME: Duration = Duration::from_secs(30);
/// How long [`Server::stop`] waits for requests that are being served.
pub const STOP_TIME: Duration = Duration::from_secs(2);

type HttpResponse = hyper::Response<Full<Bytes>>;

/// The running server; stops when dropped.
pub struct Server {
    stop: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Starts to serve on `socket`.
    pub fn start(socket: ApiSocket, service: Arc<dyn VmmService>) -> io::Result<Self> {
        let (listener, file) = socket.into_parts();
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let listener = {
            let _context = runtime.enter();
            UnixListener::from_std(listener)?
        };
        let (stop, stopped) = watch::channel(false);
        let thread = sandbox::spawn(ThreadKind::ApiServer, "api-server", move || {
            // Whoever still works on a request ends with the process.
            runtime.block_on(serve(listener, service, stopped));
            drop(file);
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Takes no further requests, lets those that are being served end (for [`STOP_TIME`]), removes the socket file.
    pub fn stop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the API server ended by a panic");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn serve(listener: UnixListener, service: Arc<dyn VmmService>, mut stopped: watch::Receiver<bool>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let free = Arc::new(Semaphore::new(MAX_WORKERS));
    let workers = Arc::new(Workers { service, free });
    loop {
        let next = async {
            let slot = slots.clone().acquire_owned().await;
            (listener.accept().await, slot)
        };
        let (accepted, slot) = match first(until_stopped(&mut stopped), next).await {
            Either::Left(_) => break,
            Either::Right(next) => next,
        };
        match accepted {
            Ok((stream, _)) => {
                let (workers, stopped) = (workers.clone(), stopped.clone());
                tokio::spawn(async move {
                    connection(stream, workers, stopped).await;
                    drop(slot);
                });
            }
            Err(e) => {
                // For example no descriptors left: others may close theirs.
                log::warn!("API connection: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
    if tokio::time::timeout(STOP_TIME, slots.acquire_many(all)).await.is_err() {
        log::warn!("API requests that are still being served are cut off");
    }
}

async fn connection(stream: UnixStream, workers: Arc<Workers>, mut stopped: watch::Receiver<bool>) {
    let answer = service_fn(move |request| {
        let workers = workers.clone();
        async move { Ok::<_, Infallible>(answer(request, workers).await) }
    });
    // Some clients close their sending half once the request is out, and still want the answer.
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .half_close(true)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(64 << 10);
    let mut served = pin!(builder.serve_connection(TokioIo::new(stream), answer));
    let result = match first(until_stopped(&mut stopped), served.as_mut()).await {
        Either::Right(result) => result,
        Either::Left(_) => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(e) = result {
        log::debug!("API connection: {e}");
    }
}

async fn answer(request: hyper::Request<Incoming>, workers: Arc<Workers>) -> HttpResponse {
    let method = request.method().as_str().to_string();
    let path = request.uri().path().to_string();
    match serve_request(request, workers).await {
        Ok(response) => {
            log::debug!("API: {method} {path}: done");
            success(&response)
        }
        Err(e) => {
            log::info!("API: {method} {path}: {} {e}", e.status);
            failure(&path, &e)
        }
    }
}

async fn serve_request(request: hyper::Request<Incoming>, workers: Arc<Workers>) -> Result<Response, ApiError> {
    let endpoint = endpoints::find(request.method().as_str(), request.uri().path())?;
    if request.uri().query().is_some() {
        let message = format!("{} takes no query parameters: send them in the body", endpoint.name);
        return Err(ApiError::new(400, "bad_query", message));
    }
    let body = read_body(request.into_body()).await?;
    let request = endpoint.request(&body)?;
    workers.serve(request).await.unwrap_or_else(|e| {
        log::error!("API: {}: {e}", endpoint.name);
        Err(ApiError::new(
            500,
            "internal",
            "the VMM failed at this request; its log tells more",
        ))
    })
}

/// Who serves requests.
struct Workers {
    service: Arc<dyn VmmService>,
    free: Arc<Semaphore>,
}

impl Workers {
    /// Serves a request on a thread of its own; an error when that failed.
    async fn serve(&self, request: Request) -> io::Result<Result<Response, ApiError>> {
        // The semaphore is never closed.
        let turn = self.free.clone().acquire_owned().await.map_err(io::Error::other)?;
        let (answer, answered) = oneshot::channel();
        let service = self.service.clone();
        sandbox::spawn(ThreadKind::ApiWorker, "api-worker", move || {
            // The client may have gone meanwhile.
            let _ = answer.send(service.call(request));
            drop(turn);
        })?;
        answered.await.map_err(|_| io::Error::other("its thread panicked"))
    }
}

async fn read_body(body: Incoming) -> Result<Bytes, ApiError> {
    let too_long = || {
        let message = format!("the body is longer than {} MiB", MAX_BODY >> 20);
        ApiError::new(413, "body_too_long", message)
    };
    // What is announced; `Limited` counts what comes.
    if body.size_hint().lower() > MAX_BODY as u64 {
        return Err(too_long());
    }
    match tokio::time::timeout(BODY_TIME, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(too_long()),
        Ok(Err(e)) => Err(ApiError::new(
            400,
            "bad_body",
            format!("the body did not come whole: {e}"),
        )),
        Err(_) => Err(ApiError::new(408, "too_slow", "the body did not come in time")),
    }
}

fn success(response: &Response) -> HttpResponse {
    let json = match response {
        Response::Empty => return reply(204, None),
        Response::Ping(ping) => serde_json::to_vec(ping),
        Response::Info(info) => serde_json::to_vec(info),
        Response::Counters(counters) => serde_json::to_vec(counters),
        #[cfg(feature = "ft")]
        Response::Ft(info) => serde_json::to_vec(info),
    };
    match json {
        Ok(json) => reply(200, Some(json)),
        Err(e) => failure(
            "",
            &ApiError::new(500, "internal", format!("the answer cannot be written: {e}")),
        ),
    }
}

fn failure(path: &str, error: &ApiError) -> HttpResponse {
    let body = ErrorBody {
        code: error.code.clone(),
        message: error.message.clone(),
    };
    let mut response = reply(error.status, serde_json::to_vec(&body).ok());
    let headers = response.headers_mut();
    if error.code == "wrong_method" {
        let allowed = endpoints::find("GET", path).map_or("PUT", |endpoint| endpoint.method.name());
        headers.insert(ALLOW, hyper::header::HeaderValue::from_static(allowed));
    }
    if matches!(error.status, 408 | 413) {
        // The rest of the body is not read.
        headers.insert(CONNECTION, hyper::header::HeaderValue::from_static("close"));
    }
    response
}

fn reply(status: u16, json: Option<Vec<u8>>) -> HttpResponse {
    let has_body = json.is_some();
    let mut response = hyper::Response::new(Full::new(Bytes::from(json.unwrap_or_default())));
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    if has_body {
        let json = hyper::header::HeaderValue::from_static("application/json");
        response.headers_mut().insert(CONTENT_TYPE, json);
    }
    response
}

async fn until_stopped(stopped: &mut watch::Receiver<bool>) {
    // An error means that the server is gone: a stop as well.
    let _ = stopped.wait_for(|stop| *stop).await;
}

enum Either<A, B> {
    Left(A),
    Right(B),
}

/// The result of whichever future ends first; `a` when both do.
async fn first<A: Future, B: Future>(a: A, b: B) -> Either<A::Output, B::Output> {
    let (mut a, mut b) = (pin!(a), pin!(b));
    std::future::poll_fn(|context| {
        if let std::task::Poll::Ready(result) = a.as_mut().poll(context) {
            return std::task::Poll::Ready(Either::Left(result));
        }
        b.as_mut().poll(context).map(Either::Right)
    })
    .await
}
