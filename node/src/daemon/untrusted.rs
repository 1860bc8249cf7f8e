//! What is read from the home's files while a node starts, as fuzz targets see it.

use super::acquaintances::Met;
use super::caps::Schedule;
use super::config::Config;
use super::local::LocalApi;
use crate::contribute;

pub(crate) fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(config) = toml::from_str::<Config>(text) else {
        return;
    };
    let _ = (
        config.bootstrap(),
        config.proxy(),
        contribute::policy(&config.contribute),
    );
    if let Ok(schedule) = Schedule::new(&config) {
        assert_eq!(Schedule::new(&config), Ok(schedule));
    }
    let again = toml::to_string(&config).expect("a configuration is text");
    // Compared as text: the parts may hold what is no number, which is not even itself.
    let read: Config = toml::from_str(&again).expect("what was written is read");
    assert_eq!(toml::to_string(&read).ok(), Some(again));
}

/// What an earlier start has kept.
pub(crate) fn kept(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Met>(bytes);
    let _ = serde_json::from_slice::<LocalApi>(bytes);
}
