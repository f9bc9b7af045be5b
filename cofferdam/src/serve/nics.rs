//! NICs that come and go while a guest runs.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::json;
use utoipa::ToSchema;

use super::app::App;
use super::extract::{Body, Name, Names, NoBody};
use super::jobs::{JobView, shown};
use super::problem::{Code, Problem};
use super::spec::is_absolute;
use crate::control::protocol::{Reply, Request};
use crate::options::{NetOption, NetSpec, NicOption, PciAddress, VmName};

/// A NIC: one of the two.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlugSpec {
    /// On a wire: `user`, `tap=NAME` or `unix=PATH[,listen]`, then perhaps `,nic=MODEL` and
    /// `,mac=ADDRESS`.
    #[serde(default)]
    net: Option<String>,
    /// One that lives elsewhere: `device=NAME[,mac=ADDRESS]`, or `vfio=ADDRESS`.
    #[serde(default)]
    nic: Option<String>,
}

impl PlugSpec {
    fn request(self) -> Result<Request, Problem> {
        let wrong = |why: String| Problem::new(Code::WrongValues, why);
        let (net, nic) = match (self.net, self.nic) {
            (Some(net), None) => {
                let net: NetOption = net
                    .parse()
                    .map_err(|error| wrong(format!("net: {error}")))?;
                if let NetSpec::Unix { path, .. } = &net.wire {
                    is_absolute("net", path.to_str())?;
                }
                (Some(net.to_string()), None)
            }
            (None, Some(nic)) => {
                let nic: NicOption = nic
                    .parse()
                    .map_err(|error| wrong(format!("nic: {error}")))?;
                (None, Some(nic.to_string()))
            }
            _ => return Err(wrong("give one of net and nic".to_owned())),
        };
        Ok(Request::Plug { net, nic })
    }
}

/// Plug a NIC in; where it is comes back.
#[utoipa::path(post, path = "/v1/guests/{name}/nics", tag = "nics", params(("name" = String, Path)),
    request_body = PlugSpec, responses((status = 200, body = Object), (status = 202, body = JobView)))]
pub async fn plug_nic(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    Body(spec): Body<PlugSpec>,
) -> Result<Response, Problem> {
    let job = app
        .ask_long(&name, "plug", spec.request()?, |reply| match reply {
            Reply::Plugged(nic) => shown(nic),
            other => Err(Problem::unexpected(&other)),
        })
        .await?;
    Ok(app.jobs.answer(job).await)
}

/// Have the guest let go of a NIC that came while it ran, and take it out.
#[utoipa::path(delete, path = "/v1/guests/{name}/nics/{address}", tag = "nics",
    params(("name" = String, Path), ("address" = String, Path)),
    responses((status = 200, body = Object), (status = 202, body = JobView)))]
pub async fn unplug_nic(
    State(app): State<Arc<App>>,
    Names(name, address): Names<VmName, PciAddress>,
    _: NoBody,
) -> Result<Response, Problem> {
    let request = Request::Unplug {
        address: address.to_string(),
    };
    let job = app
        .ask_long(&name, "unplug", request, |reply| match reply {
            Reply::Done {} => Ok(json!({})),
            other => Err(Problem::unexpected(&other)),
        })
        .await?;
    Ok(app.jobs.answer(job).await)
}
