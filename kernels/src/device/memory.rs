//! How much memory is free, where the system tells.

use std::fs;
use std::path::Path;

/// Bytes that this process may still take: of the machine's, and of every control group that it is in (a Slurm job is
/// one). `None` where the system does not tell.
pub(crate) fn free_bytes() -> Option<u64> {
    let machine = available(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Some(left_in_groups(Path::new("/sys/fs/cgroup"), &groups).map_or(machine, |left| left.min(machine)))
}

fn available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    kibibytes.checked_mul(1_024)
}

/// The least that any group of version 2 from the process's own up to the root has left.
fn left_in_groups(root: &Path, groups: &str) -> Option<u64> {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let own = root.join(own.trim());
    let groups = own.ancestors().take_while(|group| group.starts_with(root));
    let number = |group: &Path, name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    // A group without a limit says `max`, which is no number.
    groups
        .filter_map(|group| Some(number(group, "memory.max")?.saturating_sub(number(group, "memory.current")?)))
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_tells_in_kibibytes() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
        assert_eq!(available("MemAvailable: many kB\n"), None);
    }

    #[test]
    fn the_tightest_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let job = root.path().join("slurm/job");
        fs::create_dir_all(&job).unwrap();
        let write = |group: &Path, max: &str, current: &str| {
            fs::write(group.join("memory.max"), max).unwrap();
            fs::write(group.join("memory.current"), current).unwrap();
        };
        write(&job, "max\n", "100\n");
        assert_eq!(left_in_groups(root.path(), "0::/slurm/job\n"), None);
        write(job.parent().unwrap(), "1000\n", "400\n");
        assert_eq!(left_in_groups(root.path(), "0::/slurm/job\n"), Some(600));
        write(&job, "500\n", "600\n");
        assert_eq!(left_in_groups(root.path(), "1:name=other:/x\n0::/slurm/job\n"), Some(0));
        assert_eq!(left_in_groups(root.path(), "1:memory:/old\n"), None);
    }
}
