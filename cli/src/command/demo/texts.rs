//! The Universal Declaration of Human Rights in 27 languages of Europe, which the program carries. Articles 4, 9, 12, 20
//! and 27 are held out; the rest is for training.

macro_rules! texts {
    ($($code:literal),* $(,)?) => {
        /// Language code, text to train on, held-out text.
        pub(crate) const TEXTS: &[(&str, &str, &str)] = &[$((
            $code,
            include_str!(concat!("../../../data/udhr/", $code, ".train.txt")),
            include_str!(concat!("../../../data/udhr/", $code, ".txt")),
        )),*];
    };
}

texts!(
    "bg", "ca", "cs", "da", "de", "el", "en", "es", "et", "eu", "fi", "fr", "ga", "gl", "hr", "hu", "it", "lt", "lv",
    "mt", "nl", "pl", "pt", "ro", "sk", "sl", "sv",
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_held_out_article_is_trained_on() {
        for (code, train, held_out) in TEXTS {
            for paragraph in held_out.split("\n\n") {
                assert!(!train.contains(paragraph.trim()), "{code}: {paragraph}");
            }
        }
    }
}
