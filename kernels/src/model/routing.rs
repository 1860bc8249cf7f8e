//! Which experts a token goes to, and with what weights. Both engines choose here, so they choose alike.

/// How scores become a choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rule {
    pub(crate) score: Score,
    /// Experts of a token.
    pub(crate) top: usize,
    /// Groups of experts; divides their number.
    pub(crate) groups: usize,
    /// Groups that a token may choose from.
    pub(crate) groups_top: usize,
    /// How many of a group's best scores are its own.
    pub(crate) group_best: usize,
    /// Whether weights are divided by their sum.
    pub(crate) normalised: bool,
    /// What weights are multiplied by.
    pub(crate) scale: f32,
}

/// The function of the router's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Score {
    Softmax,
    Sigmoid,
}

impl Rule {
    /// The experts of one token, ascending. Equal scores go to the lower index.
    ///
    /// `scores` and `correction` are `[experts]`; the correction is empty where there is none.
    pub(crate) fn choose(&self, scores: &[f32], correction: &[f32]) -> Vec<usize> {
        let value = |expert: usize| {
            let corrected = correction.get(expert).copied().unwrap_or(0.0);
            scores.get(expert).copied().unwrap_or(f32::NEG_INFINITY) + corrected
        };
        let open = self.open_groups(scores.len(), &value);
        let width = scores.len() / self.groups.max(1);
        let candidates = (0..scores.len()).filter(|expert| open.get(expert / width.max(1)).copied().unwrap_or(false));
        let mut chosen = largest(candidates.map(|expert| (expert, value(expert))), self.top);
        chosen.sort_unstable();
        chosen
    }

    /// The weights of the chosen experts.
    pub(crate) fn weights(&self, scores: &[f32], chosen: &[usize]) -> Vec<f32> {
        let picked = || chosen.iter().map(|expert| scores.get(*expert).copied().unwrap_or(0.0));
        // A sum of nothing but zeros stays finite, as in the models' own code.
        let sum: f32 = if self.normalised {
            picked().sum::<f32>() + 1e-20
        } else {
            1.0
        };
        picked().map(|score| score / sum * self.scale).collect()
    }

    fn open_groups(&self, experts: usize, value: &impl Fn(usize) -> f32) -> Vec<bool> {
        if self.groups <= 1 {
            return vec![true];
        }
        let width = experts / self.groups;
        let score = |group: usize| {
            let members = (group * width..(group + 1) * width).map(|expert| (expert, value(expert)));
            largest(members, self.group_best).into_iter().map(value).sum::<f32>()
        };
        let best = largest((0..self.groups).map(|group| (group, score(group))), self.groups_top);
        (0..self.groups).map(|group| best.contains(&group)).collect()
    }
}

/// The indices of the `count` largest values, largest first; of equal ones the lower index.
pub(crate) fn largest(values: impl Iterator<Item = (usize, f32)>, count: usize) -> Vec<usize> {
    let mut all: Vec<(usize, f32)> = values.collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all.into_iter().take(count).map(|(index, _)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule() -> Rule {
        Rule {
            score: Score::Sigmoid,
            top: 2,
            groups: 2,
            groups_top: 1,
            group_best: 2,
            normalised: true,
            scale: 2.0,
        }
    }

    #[test]
    fn only_the_best_group_is_chosen_from() {
        // The second group's two best sum to more, though the best of all is in the first.
        let scores = [0.9, 0.0, 0.1, 0.6, 0.5, 0.4];
        assert_eq!(rule().choose(&scores, &[]), [3, 4]);
    }

    #[test]
    fn the_correction_chooses_and_does_not_weigh() {
        let scores = [0.2, 0.2, 0.3, 0.1, 0.1, 0.1];
        let correction = [1.0, 0.0, 0.5, 0.0, 0.0, 0.0];
        let chosen = rule().choose(&scores, &correction);
        assert_eq!(chosen, [0, 2]);
        let weights = rule().weights(&scores, &chosen);
        assert!((weights[0] - 0.8).abs() < 1e-6 && (weights[1] - 1.2).abs() < 1e-6);
    }

    #[test]
    fn equal_scores_go_to_the_lower_index() {
        let rule = Rule { groups: 1, ..rule() };
        assert_eq!(rule.choose(&[0.5; 4], &[]), [0, 1]);
    }
}
