//! Warnings of the engine, to the process that logs them.

use std::fmt::{Debug, Write};
use std::sync::{PoisonError, RwLock};

use rustler::{Encoder, LocalPid};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::atoms;
use crate::errors::binary;
use crate::non_scheduler::{Dead, anywhere};

/// The process that logs. Without the application there is none.
static LOGGER: RwLock<Option<LocalPid>> = RwLock::new(None);

pub(crate) fn set_logger(pid: LocalPid) {
    *LOGGER.write().unwrap_or_else(PoisonError::into_inner) = Some(pid);
}

/// Takes the events of this library. Loading it twice into one BEAM finds it installed.
pub(crate) fn install() {
    let _ = tracing::subscriber::set_global_default(Warnings);
}

/// Passes on warnings and errors, which are few by nature; everything else costs a comparison.
struct Warnings;

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Other crates' warnings are about single packets.
        metadata.target().starts_with("macula_peer")
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn event(&self, event: &Event<'_>) {
        let Some(logger) = *LOGGER.read().unwrap_or_else(PoisonError::into_inner) else { return };
        let mut text = Text(String::new());
        event.record(&mut text);
        anywhere(move |here| {
            // A dead logger logs nothing.
            let _: Result<(), Dead> =
                here.send(|env| Ok((logger, (atoms::macula_peer_log(), binary(env, &text.0)).encode(env))));
        });
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
