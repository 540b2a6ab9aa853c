//! Environment variables in a configuration file, expanded in its text before it is parsed.
//!
//! `$VAR` and `${VAR}` give the variable's value, or nothing if it is not set;
//! `${VAR == 'x'}`, `${VAR != "x"}` and `${VAR == OTHER}` give `true` or `false`. A `$` before
//! anything else stays as it is. LiteFS users' files rely on exactly this, comments included, so
//! that there is no way to quote a `$`; `-no-expand-env` turns the whole expansion off.

/// The value of a variable, if it is set.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// What is wrong with an expression, and on which line (from 1) of the text.
#[derive(Debug, PartialEq, Eq)]
pub struct ExpandError {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong there.
    pub problem: String,
}

/// `text` with every variable and comparison replaced.
pub fn expand(text: &str, lookup: Lookup) -> Result<String, ExpandError> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(body) = after.strip_prefix('{') {
            let end = body.find('}').filter(|&end| !body[..end].trim().is_empty());
            let Some(end) = end else {
                let offset = text.len() - rest.len() + at;
                return Err(ExpandError {
                    line: 1 + text[..offset].matches('\n').count(),
                    problem: "\"${\" without a variable name and a \"}\"; to keep it as it is, \
                              run with -no-expand-env"
                        .into(),
                });
            };
            out.push_str(&evaluate(body[..end].trim(), lookup));
            rest = &body[end + 1..];
        } else {
            let len = name_len(after);
            match &after[..len] {
                "" => out.push('$'),
                name => out.push_str(&lookup(name).unwrap_or_default()),
            }
            rest = &after[len..];
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// How many bytes at the start of `s` are letters, digits and underscores.
fn name_len(s: &str) -> usize {
    s.bytes()
        .take_while(|b| b.is_ascii_alphanumeric() || *b == b'_')
        .count()
}

/// The value of what stands between the braces.
fn evaluate(expression: &str, lookup: Lookup) -> String {
    let get = |name: &str| lookup(name).unwrap_or_default();
    let (left, operator_on) = expression.split_at(name_len(expression));
    let operator_on = operator_on.trim_start();
    let comparison = [("==", true), ("!=", false)]
        .into_iter()
        .find_map(|(op, equal)| Some((operator_on.strip_prefix(op)?.trim(), equal)));
    let Some((right, equal)) = comparison.filter(|_| !left.is_empty()) else {
        return get(expression);
    };
    let quoted = ['\'', '"']
        .into_iter()
        .find_map(|q| right.strip_prefix(q)?.strip_suffix(q));
    let right = match quoted {
        Some(literal) => literal.to_owned(),
        None => get(right),
    };
    ((get(left) == right) == equal).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_env(text: &str) -> Result<String, ExpandError> {
        expand(text, &|name| match name {
            "REGION" => Some("lhr".into()),
            "PRIMARY_REGION" => Some("lhr".into()),
            "OTHER" => Some("fra".into()),
            "_x1" => Some("y".into()),
            _ => None,
        })
    }

    #[test]
    fn variables_and_comparisons() {
        for (text, expected) in [
            ("", ""),
            ("plain", "plain"),
            ("a $REGION b", "a lhr b"),
            ("${REGION}x", "lhrx"),
            ("${ REGION }", "lhr"),
            ("$_x1-$_x1", "y-y"),
            ("$UNSET.", "."),
            ("${UNSET}", ""),
            ("${REGION == 'lhr'}", "true"),
            ("${REGION=='lhr'}", "true"),
            ("${REGION != 'lhr'}", "false"),
            ("${REGION == \"fra\"}", "false"),
            ("${REGION != \"fra\"}", "true"),
            ("${REGION == PRIMARY_REGION}", "true"),
            ("${REGION == OTHER}", "false"),
            ("${REGION != OTHER}", "true"),
            ("${UNSET == ''}", "true"),
            ("${UNSET == ALSO_UNSET}", "true"),
            ("costs 5$", "costs 5$"),
            ("$ $. é$é", "$ $. é$é"),
            ("$REGION$OTHER", "lhrfra"),
        ] {
            assert_eq!(with_env(text).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_value_is_not_expanded_again() {
        let out = expand("$A", &|name| (name == "A").then(|| "$A ${A}".into()));
        assert_eq!(out.as_deref(), Ok("$A ${A}"));
    }

    #[test]
    fn an_open_brace_is_an_error_with_its_line() {
        assert_eq!(with_env("a\nb: ${REGION").unwrap_err().line, 2);
        assert_eq!(with_env("a\n\n\nb: ${ }").unwrap_err().line, 4);
    }
}
