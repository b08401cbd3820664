//! Parts of a configuration that this VMM does not offer.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A part that is not offered: read whatever it holds, valid only when it is neutral (`null` or empty).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Refused(Value);

impl Refused {
    /// Whether it holds nothing that would have to be done.
    pub fn is_neutral(&self) -> bool {
        match &self.0 {
            Value::Null => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(members) => members.is_empty(),
            _ => false,
        }
    }

    /// Whether it is `null`.
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }
}
