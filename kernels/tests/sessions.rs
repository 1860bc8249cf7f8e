//! Sessions in pages: what they cost, and that sharing, going back and going on from an ended one change no bit.

mod imported_case;

use imported_case::{CASES, Case, logits};
use polder_kernels::stage::{Input, ServeStage, StageError, Step, Want};
use polder_protocol::work::Weights;

/// More than two pages, and a part of a third.
const TOKENS: u32 = 150;

#[test]
fn pages_meet_without_a_difference() {
    for case in CASES.map(Case::import) {
        let (tokens, vocabulary) = (case.tokens(TOKENS), case.config.vocabulary);
        let mut stage = case.stage(Weights::Packed);
        let whole = run(&mut stage, 1, 0, &tokens);
        // Pieces that end before, at and behind the end of a page.
        stage.open_session(2, 256).unwrap();
        let mut position = 0;
        for end in [1, 63, 64, 65, 127, 129, 150] {
            let piece = run(&mut stage, 2, position as u32, &tokens[position..end]);
            assert!(
                piece == whole[position * vocabulary..end * vocabulary],
                "{} to {end}",
                case.name
            );
            position = end;
        }
    }
}

#[test]
fn forks_share_their_past_and_go_on_as_if_alone() {
    for case in CASES.map(Case::import) {
        let (tokens, other) = (case.tokens(TOKENS), case.tokens(40));
        let mut stage = case.stage(Weights::Packed);
        run(&mut stage, 1, 0, &tokens[..100]);
        let before = stage.cache_bytes();
        assert_eq!(stage.fork_session(2, 1, 256), Ok(100), "{}", case.name);
        stage.fork_session(3, 1, 256).unwrap();
        let states = stage.session_bytes(1) - page(&stage);
        assert_eq!(stage.cache_bytes(), before + 2 * states, "{}", case.name);
        let steps = [(1, &tokens[100..]), (2, &other[..]), (3, &other[7..20])].map(|(session, tokens)| Step {
            session,
            position: 100,
            input: Input::Tokens(tokens),
        });
        let together = stage.forward_together(&steps, Want::AllLogits).unwrap();
        for (step, together) in steps.iter().zip(together) {
            let Input::Tokens(own) = step.input else { unreachable!() };
            stage.open_session(9, 256).unwrap();
            run(&mut stage, 9, 0, &tokens[..100]);
            let alone = run(&mut stage, 9, 100, own);
            assert!(logits(Ok(together)) == alone, "{} {}", case.name, step.session);
        }
        // The first has not been disturbed.
        let again = run(&mut stage, 1, 99, &tokens[99..]);
        stage.open_session(9, 256).unwrap();
        assert!(
            again == run(&mut stage, 9, 0, &tokens)[99 * case.config.vocabulary..],
            "{}",
            case.name
        );
    }
}

#[test]
fn what_is_truncated_is_free_and_computed_anew_alike() {
    for case in CASES.map(Case::import) {
        let (tokens, vocabulary) = (case.tokens(TOKENS), case.config.vocabulary);
        let mut stage = case.stage(Weights::Packed);
        let whole = run(&mut stage, 1, 0, &tokens);
        let full = stage.cache_bytes();
        assert_eq!(stage.truncate_session(1, 128), Ok(()), "{}", case.name);
        assert_eq!(stage.cache_bytes(), full - page(&stage), "{}", case.name);
        let gap = stage.truncate_session(1, 129);
        assert_eq!(
            gap,
            Err(StageError::Gap {
                position: 129,
                reached: 128
            })
        );
        let again = run(&mut stage, 1, 128, &tokens[128..]);
        assert!(again == whole[128 * vocabulary..], "{}", case.name);
    }
    let case = Case::import("nemotron_h_moe");
    let mut stage = case.stage(Weights::Packed);
    run(&mut stage, 1, 0, &case.tokens(TOKENS));
    let too_far = stage.truncate_session(1, 10);
    assert!(
        matches!(too_far, Err(StageError::Rewind { position: 10, .. })),
        "{too_far:?}"
    );
    assert_eq!(stage.truncate_session(7, 0), Err(StageError::NoSession { session: 7 }));
}

#[test]
fn a_session_goes_on_from_one_that_has_ended() {
    for case in CASES.map(Case::import) {
        let (tokens, vocabulary) = (case.tokens(TOKENS), case.config.vocabulary);
        let mut stage = case.stage(Weights::Packed);
        let whole = run(&mut stage, 1, 0, &tokens);
        stage.open_session(2, 256).unwrap();
        run(&mut stage, 2, 0, &tokens[..120]);
        stage.end_session(2);
        // As much as it has, then less, by two more sessions.
        assert_eq!(stage.open_session_from(3, 200, 2, 140), Ok(120), "{}", case.name);
        assert!(
            run(&mut stage, 3, 120, &tokens[120..]) == whole[120 * vocabulary..],
            "{}",
            case.name
        );
        assert_eq!(stage.open_session_from(4, 200, 2, 101), Ok(101), "{}", case.name);
        assert!(
            run(&mut stage, 4, 101, &tokens[101..]) == whole[101 * vocabulary..],
            "{}",
            case.name
        );
        // From one that goes on, and from one that is gone.
        assert_eq!(stage.open_session_from(5, 200, 3, 149), Ok(149));
        assert!(
            run(&mut stage, 5, 149, &tokens[149..]) == whole[149 * vocabulary..],
            "{}",
            case.name
        );
        stage.close_session(2);
        assert_eq!(stage.open_session_from(6, 200, 2, 101), Ok(0));
        assert!(run(&mut stage, 6, 0, &tokens) == whole, "{}", case.name);
    }
    // A recurrent state that cannot go back so far is not gone on from.
    let case = Case::import("nemotron_h_moe");
    let mut stage = case.stage(Weights::Packed);
    run(&mut stage, 1, 0, &case.tokens(TOKENS));
    stage.end_session(1);
    assert_eq!(stage.open_session_from(2, 256, 1, 20), Ok(0));
}

#[test]
fn a_context_costs_what_it_uses_and_is_sure_of_the_rest() {
    let case = Case::import("llama_rope_llama3");
    let tokens = case.tokens(TOKENS);
    let mut stage = case.stage(Weights::Packed);
    assert_eq!(stage.cache_bytes(), 0);
    run(&mut stage, 1, 0, &tokens[..10]);
    assert_eq!(stage.cache_bytes(), page(&stage));
    // Two contexts of four pages fit, whatever they use of them; a third is refused, and harms nobody.
    stage.set_cache_bytes_max(8 * page(&stage));
    stage.open_session(2, 256).unwrap();
    let refused = stage.open_session(3, 64);
    assert!(
        matches!(refused, Err(StageError::Memory { free: 0, .. })),
        "{refused:?}"
    );
    let expected = run(&mut stage, 2, 0, &tokens);
    assert!(run(&mut stage, 1, 0, &tokens) == expected);
    stage.close_session(2);
    stage.close_session(1);
    assert_eq!(stage.cache_bytes(), 0);
}

#[test]
fn ended_sessions_make_room_the_oldest_first() {
    let case = Case::import("llama_rope_llama3");
    let tokens = case.tokens(TOKENS);
    let mut stage = case.stage(Weights::Packed);
    stage.close_session(1);
    stage.set_cache_bytes_max(8 * page(&stage));
    for session in [1, 2] {
        stage.open_session(session, 192).unwrap();
        run(&mut stage, session, 0, &tokens);
        stage.end_session(session);
    }
    // Used last, though it ended first.
    assert_eq!(stage.open_session_from(3, 192, 1, 128), Ok(128));
    stage.end_session(3);
    assert_eq!(stage.cache_bytes(), 6 * page(&stage));
    // Ended sessions stand in nobody's way.
    stage.open_session(4, 256).unwrap();
    stage.open_session(5, 256).unwrap();
    assert_eq!(stage.cache_bytes(), 6 * page(&stage));
    run(&mut stage, 4, 0, &tokens);
    assert_eq!(stage.cache_bytes(), 6 * page(&stage));
    stage.close_session(5);
    assert_eq!(stage.open_session_from(5, 192, 2, 128), Ok(0));
    stage.close_session(5);
    assert_eq!(stage.open_session_from(5, 192, 1, 128), Ok(128));
}

/// Logits of all of `tokens`, from `position` on.
fn run(stage: &mut ServeStage, session: u64, position: u32, tokens: &[u32]) -> Vec<f32> {
    logits(stage.forward(session, position, Input::Tokens(tokens), Want::AllLogits))
}

fn page(stage: &ServeStage) -> u64 {
    stage.session_bytes(65) - stage.session_bytes(64)
}
