//! Registration: with an auth key, with a key that control knows already, or through a person who opens
//! a URL.

use podtether_core::register::{RegisterOutcome, decide, is_wrapped_auth_key, login_survives};
use podtether_core::tailcfg::{RegisterAuth, RegisterRequest, RegisterResponse};
use podtether_proto::exit::EngineExit;

use super::session::{Session, register_request};
use super::{Client, Event, Failure, Gone};
use crate::reason::Ending;

type Attempt<T> = Result<Result<T, Failure>, Gone>;

impl Client {
    /// Registers, through a login if there has to be one.
    pub(super) async fn register(&mut self, session: &Session) -> Attempt<()> {
        let fatal = |exit, reason: String| Ok(Err(Failure::Fatal(Ending::new(exit, reason))));
        let auth_key = self.identity.auth_key.clone();
        if auth_key.as_ref().is_some_and(|key| is_wrapped_auth_key(key.expose())) {
            let reason = "the auth key is wrapped for tailnet lock (--TL…), which engines cannot use: give them a \
                          key without that part and sign their node keys with `tailscale lock sign`";
            return fatal(EngineExit::KeyRejected, reason.to_owned());
        }
        loop {
            let host = self.host.borrow().clone();
            let mut request = register_request(&self.identity, &host);
            match &self.login {
                Some(url) => request.followup.clone_from(url),
                None => {
                    request.auth =
                        auth_key.as_ref().map(|key| RegisterAuth { auth_key: key.expose().to_owned() });
                }
            }
            let answer = match self.ask(session, &request).await? {
                Ok(answer) => answer,
                Err(failure) => {
                    if matches!(&failure, Failure::Refused { status, .. } if !login_survives(*status)) {
                        self.login = None;
                    }
                    return Ok(Err(failure));
                }
            };
            match decide(&answer) {
                RegisterOutcome::Registered => {
                    self.login = None;
                    self.tell(Event::Registered { approved: true }).await?;
                    return Ok(Ok(()));
                }
                RegisterOutcome::NeedsApproval => {
                    self.login = None;
                    self.tell(Event::Registered { approved: false }).await?;
                    return Ok(Ok(()));
                }
                RegisterOutcome::NeedsLogin { .. } if auth_key.is_none() && !self.identity.interactive => {
                    let reason = "the control server does not know this node key and wants an auth key";
                    return fatal(EngineExit::KeyRejected, reason.to_owned());
                }
                RegisterOutcome::NeedsLogin { url } if request.followup == url => {
                    return Ok(Err(Failure::refused(format!("nobody has opened {url} yet"))));
                }
                RegisterOutcome::NeedsLogin { url } => {
                    // The one before it, if there was one, has run out.
                    self.login = Some(url.clone());
                    self.tell(Event::NeedsLogin { url }).await?;
                }
                RegisterOutcome::KeyExpired => {
                    let reason = "the control server says that the node key has expired";
                    return fatal(EngineExit::NodeKeyExpired, reason.to_owned());
                }
                RegisterOutcome::AuthKeyRejected { reason } => {
                    let reason = format!("the control server refused the auth key: {reason}");
                    return fatal(EngineExit::KeyRejected, reason);
                }
                RegisterOutcome::Unsigned { reason } => {
                    let key = self.identity.node_key;
                    return Ok(Err(Failure::refused(format!(
                        "the tailnet is locked and does not take this node's key ({reason}): run `tailscale lock \
                         sign {key}` on a node that the lock trusts"
                    ))));
                }
                RegisterOutcome::Rejected { reason } => {
                    self.login = None;
                    let reason = format!("the control server refused the registration: {reason}");
                    return Ok(Err(Failure::refused(reason)));
                }
            }
        }
    }

    /// One request; one that waits for a login says so when it is not answered at once.
    async fn ask(&mut self, session: &Session, request: &RegisterRequest) -> Attempt<RegisterResponse> {
        let url = &self.identity.url;
        let asking = session.register(request);
        tokio::pin!(asking);
        if request.followup.is_empty() {
            let late = || Failure::Unreachable(format!("{url} did not answer the registration"));
            let answer = tokio::time::timeout(self.timing.register, asking).await;
            return Ok(answer.unwrap_or_else(|_| Err(late())));
        }
        if let Ok(answer) = tokio::time::timeout(self.timing.login_told, &mut asking).await {
            return Ok(answer);
        }
        self.events.send(Event::NeedsLogin { url: request.followup.clone() }).await.map_err(|_| Gone)?;
        let patience = tokio::time::sleep(self.timing.login);
        tokio::pin!(patience);
        loop {
            tokio::select! {
                answer = &mut asking => return Ok(answer),
                () = &mut patience => {
                    let reason = format!("nobody has opened {} yet", request.followup);
                    return Ok(Err(Failure::Unreachable(reason)));
                }
                logout = self.logouts.recv() => {
                    let reason = "there is nothing to log out: a login is waited for";
                    let _ = logout.ok_or(Gone)?.send(Err(reason.to_owned()));
                }
            }
        }
    }
}
