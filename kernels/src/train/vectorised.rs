//! Loops that are compiled for each width of vectors, and chosen when they run.

/// Compiles a function for AVX-512, for AVX2 and for any processor. Nothing is contracted or reordered, so all of them
/// give the same bits.
macro_rules! vectorised {
    ($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block) => {
        $(#[$doc])*
        pub(super) fn $name($($argument: $type),*) $(-> $out)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $out)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx2,fma")]
                fn wide($($argument: $type),*) $(-> $out)? {
                    body($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn narrow($($argument: $type),*) $(-> $out)? {
                    body($($argument),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                {
                    // SAFETY: the processor has AVX-512, and with it AVX2 and FMA.
                    return unsafe { wide($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the processor has both.
                    return unsafe { narrow($($argument),*) };
                }
            }
            body($($argument),*)
        }
    };
}
pub(super) use vectorised;

/// A sum of `value(index)` below `count`, in 16 lanes that are folded in halves.
#[inline(always)]
pub(super) fn lane_sum(count: usize, value: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let whole = count / 16 * 16;
    let mut at = 0;
    while at < whole {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += value(at + lane);
        }
        at += 16;
    }
    for (lane, sum) in lanes.iter_mut().enumerate().take(count - whole) {
        *sum += value(whole + lane);
    }
    let mut width = 8;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}
