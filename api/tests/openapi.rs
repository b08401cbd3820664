//! `openapi/cloud-hypervisor.yaml` says what the server does: the same paths, the same names.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use api::config::*;
use api::server::endpoints::{ENDPOINTS, NOT_OFFERED};
use serde::de::{self, Deserialize, Visitor};
use yaml_rust2::{Yaml, YamlLoader};

fn file() -> Yaml {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi/cloud-hypervisor.yaml");
    YamlLoader::load_from_str(&std::fs::read_to_string(path).unwrap())
        .unwrap()
        .remove(0)
}

fn keys(yaml: &Yaml) -> BTreeSet<String> {
    let hash = yaml.as_hash().unwrap_or_else(|| panic!("{yaml:?} is no mapping"));
    hash.keys().map(|key| key.as_str().unwrap().to_string()).collect()
}

#[test]
fn the_paths_are_those_that_are_served() {
    let file = file();
    let mut described = BTreeSet::new();
    for path in keys(&file["paths"]) {
        for method in keys(&file["paths"][path.as_str()]) {
            described.insert((method.to_uppercase(), path.trim_start_matches('/').to_string()));
        }
    }
    let mut served: BTreeSet<_> = ENDPOINTS
        .iter()
        .map(|e| (e.method.name().to_string(), e.name.to_string()))
        .collect();
    // A build without fault tolerance refuses those endpoints; the file describes the whole.
    for name in NOT_OFFERED.iter().filter(|name| name.starts_with("vm.ft-")) {
        let method = if name.ends_with("-info") { "GET" } else { "PUT" };
        served.insert((method.into(), name.to_string()));
    }
    assert_eq!(described, served);
}

#[test]
fn every_answer_with_an_error_is_described_and_every_reference_leads_somewhere() {
    let file = file();
    let schemas = keys(&file["components"]["schemas"]);
    let mut used = BTreeSet::new();
    references(&file, &mut used);
    for reference in &used {
        let found = match reference.strip_prefix("#/components/schemas/") {
            Some(name) => schemas.contains(name),
            None => reference == "#/components/responses/Error",
        };
        assert!(found, "{reference}");
    }
    for name in &schemas {
        assert!(
            used.contains(&format!("#/components/schemas/{name}")),
            "{name} is described but not used"
        );
    }
    for path in keys(&file["paths"]) {
        for method in keys(&file["paths"][path.as_str()]) {
            assert!(
                !file["paths"][path.as_str()][method.as_str()]["responses"]["default"].is_badvalue(),
                "{path}"
            );
        }
    }
}

fn references(yaml: &Yaml, found: &mut BTreeSet<String>) {
    match yaml {
        Yaml::Hash(hash) => {
            for (key, value) in hash {
                match (key.as_str(), value.as_str()) {
                    (Some("$ref"), Some(target)) => drop(found.insert(target.into())),
                    _ => references(value, found),
                }
            }
        }
        Yaml::Array(items) => items.iter().for_each(|item| references(item, found)),
        _ => {}
    }
}

/// The names that a type asks serde for: fields of a struct, variants of an enum.
#[derive(Debug)]
struct Names(&'static [&'static str]);

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl std::error::Error for Names {}

impl de::Error for Names {
    fn custom<T: fmt::Display>(message: T) -> Self {
        panic!("{message}")
    }
}

/// Answers every type with its own names.
struct Asks;

impl<'de> de::Deserializer<'de> for Asks {
    type Error = Names;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Names> {
        panic!("neither struct nor enum")
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Names> {
        Err(Names(fields))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Names> {
        Err(Names(variants))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map identifier ignored_any
    }
}

fn names<T: Deserialize<'static>>() -> BTreeSet<String> {
    let Err(Names(names)) = T::deserialize(Asks) else {
        panic!("a value out of nothing")
    };
    names.iter().map(|name| name.to_string()).collect()
}

/// Schemas by name with the names of their Rust types.
fn types() -> BTreeMap<&'static str, BTreeSet<String>> {
    let types = BTreeMap::from([
        ("Error", names::<api::service::ErrorBody>()),
        ("VmmPingResponse", names::<api::VmmPingResponse>()),
        ("VmState", names::<api::VmState>()),
        ("VmInfo", names::<api::VmInfo>()),
        ("DeviceNode", names::<api::DeviceNode>()),
        ("VmConfig", names::<VmConfig>()),
        ("PayloadConfig", names::<PayloadConfig>()),
        ("CpusConfig", names::<CpusConfig>()),
        ("CpuAffinity", names::<CpuAffinity>()),
        ("CpuTopology", names::<CpuTopology>()),
        ("CpuFeatures", names::<CpuFeatures>()),
        ("CoreSchedulingMode", names::<CoreSchedulingMode>()),
        ("MemoryConfig", names::<MemoryConfig>()),
        ("DiskConfig", names::<DiskConfig>()),
        ("ImageType", names::<ImageType>()),
        ("LockGranularity", names::<LockGranularity>()),
        ("NetConfig", names::<NetConfig>()),
        ("LandlockConfig", names::<api::config::LandlockConfig>()),
        ("RngConfig", names::<RngConfig>()),
        ("ConsoleMode", names::<ConsoleMode>()),
        ("ConsoleConfig", names::<ConsoleConfig>()),
        ("DebugConsoleConfig", names::<DebugConsoleConfig>()),
        ("PlatformConfig", names::<PlatformConfig>()),
        ("VmSnapshotConfig", names::<api::VmSnapshotConfig>()),
        ("MemoryRestoreMode", names::<api::service::MemoryRestoreMode>()),
        ("RestoreConfig", names::<api::RestoreConfig>()),
    ]);
    #[cfg(feature = "ft")]
    let types = types
        .into_iter()
        .chain([
            ("FtReceiveConfig", names::<ft::config::FtReceiveConfig>()),
            ("FtDiskOverride", names::<ft::config::FtDiskOverride>()),
            ("FtNetOverride", names::<ft::config::FtNetOverride>()),
            ("FtDurability", names::<ft::config::FtDurability>()),
            ("FtAudit", names::<ft::config::FtAudit>()),
            ("FtAuditInfo", names::<ft::config::FtAuditInfo>()),
            ("FtTls", names::<ft::config::FtTls>()),
            ("FtEnableConfig", names::<ft::config::FtEnableConfig>()),
            ("FtLimits", names::<ft::config::FtLimits>()),
            ("FtLimitsPatch", names::<ft::config::FtLimitsPatch>()),
            ("FtState", names::<ft::config::FtState>()),
            ("FtRole", names::<ft::config::FtRole>()),
            ("FtStat", names::<ft::config::FtStat>()),
            ("FtProgress", names::<ft::config::FtProgress>()),
            ("FtReprotection", names::<ft::reprotect::FtReprotection>()),
            ("FtInfo", names::<ft::config::FtInfo>()),
        ])
        .collect();
    types
}

#[test]
fn the_names_are_those_of_the_types() {
    let file = file();
    let schemas = &file["components"]["schemas"];
    let types = types();
    for (name, expected) in &types {
        let schema = &schemas[*name];
        let described = match schema["enum"].as_vec() {
            Some(values) => values.iter().map(|value| value.as_str().unwrap().to_string()).collect(),
            None => keys(&schema["properties"]),
        };
        assert_eq!(&described, expected, "{name}");
    }
    let others: Vec<_> = keys(schemas)
        .into_iter()
        .filter(|name| !types.contains_key(name.as_str()))
        .collect();
    let others: Vec<_> = others
        .iter()
        .filter(|name| !name.starts_with("Ft") || cfg!(feature = "ft"))
        .collect();
    assert_eq!(others, ["NotOffered", "VmCounters"]);
}

#[test]
fn the_defaults_are_those_of_the_types() {
    let file = file();
    let default = |schema: &str, value: serde_json::Value| {
        let properties = &file["components"]["schemas"][schema]["properties"];
        for name in keys(properties) {
            let expected: serde_json::Value = match &properties[name.as_str()]["default"] {
                Yaml::BadValue => continue,
                Yaml::Boolean(value) => (*value).into(),
                Yaml::Integer(value) => (*value).into(),
                Yaml::String(value) => value.as_str().into(),
                other => panic!("{schema}.{name}: {other:?}"),
            };
            let got = &value[&name];
            // Fields that are printed only when they are set.
            let silent = got.is_null() && expected == serde_json::Value::Bool(false);
            assert!(
                silent || *got == expected,
                "{schema}.{name}: {got}, described as {expected}"
            );
        }
    };
    default("VmConfig", serde_json::to_value(VmConfig::default()).unwrap());
    default("CpusConfig", serde_json::to_value(CpusConfig::default()).unwrap());
    default("MemoryConfig", serde_json::to_value(MemoryConfig::default()).unwrap());
    default("DiskConfig", serde_json::to_value(DiskConfig::default()).unwrap());
    default("NetConfig", serde_json::to_value(NetConfig::default()).unwrap());
    default("RngConfig", serde_json::to_value(RngConfig::default()).unwrap());
    default(
        "PlatformConfig",
        serde_json::to_value(serde_json::from_str::<PlatformConfig>("{}").unwrap()).unwrap(),
    );
    #[cfg(feature = "ft")]
    default(
        "FtLimits",
        serde_json::to_value(ft::config::FtLimits::default()).unwrap(),
    );
}
