//! The index's twin without a disk, for tests and for nodes that keep nothing.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{KEY_BYTES_MAX, KeyValue, SCAN_MAX, Store, StoreError, VALUE_BYTES_MAX, check_length};

/// An index in memory.
#[derive(Debug, Default)]
pub struct MemoryStore {
    entries: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl MemoryStore {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Vec<u8>, Vec<u8>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.lock().get(key).cloned())
    }

    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        check_length("key", key.len(), KEY_BYTES_MAX)?;
        check_length("value", value.len(), VALUE_BYTES_MAX)?;
        self.lock().insert(key.to_vec(), value.to_vec());
        Ok(())
    }

    fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
        self.lock().remove(key);
        Ok(())
    }

    fn scan(&self, prefix: &[u8], limit: usize) -> Result<Vec<KeyValue>, StoreError> {
        let entries = self.lock();
        let from = entries.range::<[u8], _>((Bound::Included(prefix), Bound::Unbounded));
        let with_prefix = from.take_while(|(key, _)| key.starts_with(prefix));
        let first = with_prefix.take(limit.min(SCAN_MAX));
        Ok(first.map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }
}
