"""Episodes: a learner that begins each of many small streams from the same start, and what it answers at their ends."""

from clstream.episodes.outcomes import EpisodeEnded as EpisodeEnded
from clstream.episodes.outcomes import EpisodeOutcome as EpisodeOutcome
from clstream.episodes.outcomes import EpisodesResult as EpisodesResult
from clstream.episodes.runner import run_episodes as run_episodes
