//! What has to be done to a directory of network configurations, from what is in it.

use super::conf::{self, Entry, Form, Network};

/// Behind the name of a `.conf` that a `.conflist` stands for: no runtime reads it.
pub const SAVED: &str = ".podtether-saved";

/// One file of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its name.
    pub name: String,
    /// Its text, or why it cannot be read: the rest of a sentence.
    pub text: Result<String, String>,
}

/// One change of the directory; each is made whole or not at all, and none when a file is not as expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The file gets another text.
    Write {
        /// Its name.
        name: String,
        /// What it holds; `None` when there is none.
        expected: Option<String>,
        /// What it shall hold.
        text: String,
    },
    /// The file gets another name.
    Move {
        /// Its name.
        name: String,
        /// What it holds.
        expected: String,
        /// Its new name.
        to: String,
        /// A file of that name may go.
        replace: bool,
    },
    /// The file goes.
    Remove {
        /// Its name.
        name: String,
        /// What it holds.
        expected: String,
    },
}

impl Step {
    /// The file that it is about.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Write { name, .. } | Self::Move { name, .. } | Self::Remove { name, .. } => name,
        }
    }
}

/// What to do, and what to say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The file that the runtime takes.
    pub chosen: Option<String>,
    /// In this order.
    pub steps: Vec<Step>,
    /// Files that are left alone, each with the reason.
    pub refused: Vec<String>,
    /// False where the runtime's file cannot have our entry.
    pub possible: bool,
}

impl Plan {
    /// Our entry is where the runtime reads it.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.possible && self.steps.is_empty()
    }
}

fn read(file: &File) -> Option<Result<(Form, &str, Network), String>> {
    let form = conf::form(&file.name)?;
    let text = match &file.text {
        Ok(text) => text,
        Err(why) => return Some(Err(why.clone())),
    };
    Some(Network::read(form, text).map(|network| (form, text.as_str(), network)))
}

fn sorted(files: &[File]) -> Vec<&File> {
    let mut sorted: Vec<&File> = files.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    sorted
}

/// Puts our entry into the configuration that a runtime takes: the first in the order of names that it can use.
#[must_use]
pub fn install(files: &[File], entry: &Entry) -> Plan {
    let files = sorted(files);
    let mut plan = Plan::default();
    let mut chosen = None;
    for file in &files {
        match read(file) {
            None => {}
            Some(Ok(read)) => {
                chosen = Some((*file, read));
                break;
            }
            Some(Err(why)) => plan.refused.push(format!(
                "{} {why}: it is left as it is; some runtimes stop at it, others take the next",
                file.name
            )),
        }
    }
    let Some((file, (form, text, _))) = chosen else { return plan };
    plan.chosen = Some(file.name.clone());
    let made = match form {
        Form::List => conf::chain(text, entry).map(|new| (file.name.clone(), new)),
        Form::Single => conf::list_of(text)
            .and_then(|list| conf::chain(&list, entry))
            .and_then(|new| Ok((name_for_list(&file.name, &files)?, new))),
    };
    let (target, new) = match made {
        Ok(made) => made,
        Err(why) => {
            plan.refused.push(format!("{} {why}: podtether is not chained into it", file.name));
            return plan;
        }
    };
    plan.possible = true;
    let there = files.iter().find(|f| f.name == target).and_then(|f| f.text.clone().ok());
    if there.as_ref() != Some(&new) {
        plan.steps.push(Step::Write { name: target.clone(), expected: there, text: new });
    }
    // One that comes after the list is not read any more where it is.
    if form == Form::Single && file.name < target {
        let to = format!("{}{SAVED}", file.name);
        plan.steps.push(Step::Move { name: file.name.clone(), expected: text.to_owned(), to, replace: true });
    }
    // A runtime that reads several networks would have each pod join by each.
    for other in files.iter().filter(|other| other.name != target && other.name != file.name) {
        if let Some(Ok((Form::List, text, network))) = read(other)
            && network.ours().is_some()
            && let Ok(new) = conf::unchain(text)
            && !new.is_empty()
        {
            let (name, expected) = (other.name.clone(), Some(text.to_owned()));
            plan.steps.push(Step::Write { name, expected, text: new });
        }
    }
    plan
}

/// The list that stands for a `.conf`: of the same stem, unless somebody else has one of that name.
fn name_for_list(conf: &str, files: &[&File]) -> Result<String, String> {
    let stem = stem(conf);
    let is_free = |name: &String| match files.iter().find(|file| &file.name == name).map(|file| read(file)) {
        None => true,
        Some(Some(Ok((_, _, network)))) => network.ours().is_some(),
        Some(_) => false,
    };
    let names = [format!("{stem}.conflist"), format!("{stem}-podtether.conflist")];
    names.into_iter().find(is_free).ok_or_else(|| {
        format!("is no list, and {stem}.conflist and {stem}-podtether.conflist are somebody else's")
    })
}

fn stem(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

/// Takes our entry out of every configuration.
#[must_use]
pub fn uninstall(files: &[File]) -> Plan {
    let files = sorted(files);
    let mut plan = Plan { possible: true, ..Plan::default() };
    for file in &files {
        let (text, network) = match read(file) {
            None | Some(Ok((Form::Single, ..))) => continue,
            Some(Ok((Form::List, text, network))) => (text, network),
            Some(Err(why)) => {
                if file.text.as_ref().map_or(true, |text| text.contains(conf::OURS)) {
                    plan.possible = false;
                    plan.refused.push(format!(
                        "{} {why}: whether podtether-cni is in it cannot be said, so the plugin stays; mend or \
                         remove the file and try again",
                        file.name
                    ));
                }
                continue;
            }
        };
        if network.ours().is_none() {
            continue;
        }
        let bare = match conf::unchain(text) {
            Ok(bare) => bare,
            Err(why) => {
                plan.possible = false;
                plan.refused.push(format!("{} {why}: take podtether-cni out by hand", file.name));
                continue;
            }
        };
        let (name, expected) = (file.name.clone(), text.to_owned());
        let saved = original(&file.name, &files, SAVED);
        // Nobody but us has made a list of what a `.conf` has, so nobody misses it.
        let alike = |text: &str| {
            let list = Network::read(Form::List, &bare).map(|list| (list.name, list.types));
            Network::read(Form::Single, text).map(|single| (single.name, single.types)) == list
        };
        let made_of_saved =
            saved.as_ref().is_some_and(|(_, text, _)| conf::list_of(text).as_ref() == Ok(&bare));
        if made_of_saved || original(&file.name, &files, "").is_some_and(|(_, text, _)| alike(text)) {
            if let Some((conf, text, saved)) = saved {
                let (name, expected) = (saved, text.to_owned());
                plan.steps.push(if files.iter().any(|file| file.name == conf) {
                    Step::Remove { name, expected }
                } else {
                    Step::Move { name, expected, to: conf, replace: false }
                });
            }
            plan.steps.push(Step::Remove { name, expected });
            continue;
        }
        plan.steps.push(if bare.is_empty() {
            Step::Remove { name, expected }
        } else {
            Step::Write { name, expected: Some(expected), text: bare }
        });
        if let Some((_, text, name)) = saved {
            plan.steps.push(Step::Remove { name, expected: text.to_owned() });
        }
    }
    plan
}

/// The `.conf` that a list of ours may stand for, kept with this behind its name: its own name, its text, and the
/// name of the file.
fn original<'a>(list: &str, files: &[&'a File], behind: &str) -> Option<(String, &'a str, String)> {
    let of_list = stem(list);
    let stems = [of_list, of_list.strip_suffix("-podtether").unwrap_or(of_list)];
    let conf_of = |file: &&'a File| {
        let conf = file.name.strip_suffix(behind)?;
        let text = file.text.as_ref().ok()?;
        let is_it = conf::form(conf) == Some(Form::Single) && stems.contains(&stem(conf));
        is_it.then(|| (conf.to_owned(), text.as_str(), file.name.clone()))
    };
    files.iter().find_map(conf_of)
}
