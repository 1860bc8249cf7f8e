use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;

use super::*;

/// Names the folder in which a child process of a test is to write and die.
const CHILD_FOLDER: &str = "POLDER_TEST_STORE_FOLDER";

#[test]
fn what_was_put_is_there_after_reopening() {
    let home = tempfile::tempdir().expect("a folder");
    let path = home.path().join("index");
    {
        let store = open(&path);
        store.put(b"peer/1", b"one").expect("put");
        store.put(b"peer/2", b"two").expect("put");
        store.put(b"pear", b"fruit").expect("put");
        store.remove(b"peer/1").expect("removed");
        store.flush().expect("flushed");
    }
    let store = open(&path);
    assert_eq!(store.get(b"peer/1").expect("read"), None);
    assert_eq!(
        store.scan(b"peer/", 9).expect("read"),
        [(b"peer/2".to_vec(), b"two".to_vec())]
    );
    assert_eq!(store.scan(b"pe", 1).expect("read").len(), 1);
}

#[test]
fn a_value_that_belongs_in_a_file_is_refused() {
    let home = tempfile::tempdir().expect("a folder");
    let stores: [Box<dyn Store>; 2] = [
        Box::new(open(&home.path().join("index"))),
        Box::new(MemoryStore::default()),
    ];
    for store in stores {
        store.put(b"key", &[7; VALUE_BYTES_MAX]).expect("just short enough");
        assert!(matches!(
            store.put(b"key", &[0; VALUE_BYTES_MAX + 1]),
            Err(StoreError::TooLong { what: "value", .. })
        ));
        assert!(matches!(
            store.put(&[0; KEY_BYTES_MAX + 1], b""),
            Err(StoreError::TooLong { what: "key", .. })
        ));
    }
}

#[test]
fn a_damaged_value_is_absent_and_counted() {
    let home = tempfile::tempdir().expect("a folder");
    let store = open(&home.path().join("index"));
    store.put(b"a", b"whole").expect("put");
    store.put_raw(b"b", b"\x01too short");
    store.put_raw(b"c", b"");
    store.put_raw(b"d", b"\x02another version's value");
    assert_eq!(store.get(b"b").expect("read"), None);
    assert_eq!(store.scan(b"", 9).expect("read"), [(b"a".to_vec(), b"whole".to_vec())]);
    assert_eq!(store.damaged_values(), 4);
}

#[test]
fn a_damaged_index_is_set_aside_and_begun_anew() {
    let home = tempfile::tempdir().expect("a folder");
    let path = home.path().join("index");
    for round in 0..2 {
        fill(&path);
        overwrite_all(&path);
        let opened = DiskStore::open(&path).expect("opened");
        let aside = opened
            .set_aside
            .unwrap_or_else(|| panic!("not noticed in round {round}"));
        assert!(aside.path.exists() && !aside.reason.is_empty());
        assert_eq!(opened.store.scan(b"", 9).expect("read"), []);
        opened.store.put(b"new", b"life").expect("put");
        assert_eq!(opened.store.get(b"new").expect("read"), Some(b"life".to_vec()));
    }
    // Only the last one is kept.
    let kept = fs::read_dir(home.path()).expect("listed").count();
    assert_eq!(kept, 2);
}

#[test]
fn a_damaged_configuration_costs_at_most_the_index() {
    for damage in [overwrite_configuration, truncate_configuration] {
        let home = tempfile::tempdir().expect("a folder");
        let path = home.path().join("index");
        fill(&path);
        damage(&path);
        let opened = DiskStore::open(&path).expect("opened");
        let entries = opened.store.scan(b"", SCAN_MAX).expect("read").len();
        assert_eq!(entries, if opened.set_aside.is_some() { 0 } else { 300 });
    }
}

#[test]
fn no_damage_anywhere_keeps_it_from_opening_or_changes_a_value() {
    let home = tempfile::tempdir().expect("a folder");
    for place in 0..12 {
        let path = home.path().join(format!("index{place}"));
        fill(&path);
        let file = path.join("db");
        let mut bytes = fs::read(&file).expect("read");
        let start = bytes.len() * place / 12;
        let end = bytes.len().min(start + 64);
        bytes[start..end].iter_mut().for_each(|byte| *byte ^= 0x5a);
        fs::write(&file, bytes).expect("written");
        let store = DiskStore::open(&path).expect("opened").store;
        for (key, value) in store.scan(b"", SCAN_MAX).expect("read") {
            assert_eq!(value, value_of(&key));
        }
    }
}

#[test]
fn a_process_that_aborts_loses_nothing_that_was_flushed() {
    let home = tempfile::tempdir().expect("a folder");
    let path = home.path().join("index");
    for life in 0..3 {
        let status = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "store::tests::child_that_writes_and_aborts", "--ignored"])
            .env(CHILD_FOLDER, &path)
            .output()
            .expect("run")
            .status;
        assert!(!status.success(), "the child must die in life {life}");
        let opened = DiskStore::open(&path).expect("opened");
        assert_eq!(opened.set_aside, None);
        let flushed = opened.store.scan(b"flushed/", SCAN_MAX).expect("read");
        assert_eq!(flushed.len(), 500);
        assert!(flushed.iter().all(|(key, value)| *value == value_of(key)));
    }
}

#[test]
#[ignore = "a part of another test, which starts it as a process of its own"]
fn child_that_writes_and_aborts() {
    let Some(path) = std::env::var_os(CHILD_FOLDER).map(PathBuf::from) else {
        return;
    };
    let store = open(&path);
    write(&store, "flushed", 500);
    store.flush().expect("flushed");
    write(&store, "maybe", 2_000);
    std::process::abort();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn the_two_stores_agree(
        steps in proptest::collection::vec(
            (0u8..3, proptest::collection::vec(0u8..3, 0..4), proptest::collection::vec(any::<u8>(), 0..9)),
            0..60,
        ),
    ) {
        let home = tempfile::tempdir().expect("a folder");
        let disk = open(&home.path().join("index"));
        let memory = MemoryStore::default();
        for (what, key, value) in &steps {
            for store in [&disk as &dyn Store, &memory] {
                match what {
                    0 => store.remove(key).expect("removed"),
                    _ => store.put(key, value).expect("put"),
                }
            }
            prop_assert_eq!(disk.get(key).expect("read"), memory.get(key).expect("read"));
            prop_assert_eq!(disk.scan(key, 5).expect("read"), memory.scan(key, 5).expect("read"));
        }
    }
}

fn open(path: &Path) -> DiskStore {
    let opened = DiskStore::open(path).expect("opened");
    assert_eq!(opened.set_aside, None);
    opened.store
}

fn fill(path: &Path) {
    let store = DiskStore::open(path).expect("opened").store;
    write(&store, "key", 300);
    store.flush().expect("flushed");
}

fn write(store: &DiskStore, prefix: &str, count: u32) {
    for number in 0..count {
        let key = format!("{prefix}/{number:05}").into_bytes();
        store.put(&key, &value_of(&key)).expect("put");
    }
}

fn value_of(key: &[u8]) -> Vec<u8> {
    key.repeat(9)
}

fn overwrite_all(path: &Path) {
    for entry in files(path) {
        let length = fs::metadata(&entry).expect("there").len();
        fs::write(&entry, vec![0xa5; usize::try_from(length).expect("short")]).expect("written");
    }
}

fn overwrite_configuration(path: &Path) {
    fs::write(path.join("conf"), [0xff; 64]).expect("written");
}

fn truncate_configuration(path: &Path) {
    fs::write(path.join("conf"), []).expect("written");
}

fn files(path: &Path) -> Vec<PathBuf> {
    let listed = fs::read_dir(path)
        .expect("listed")
        .map(|entry| entry.expect("entry").path());
    listed.filter(|entry| entry.is_file()).collect()
}
