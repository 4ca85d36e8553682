// The lifecycle of a seed: the one place where its states and legal moves are written down.
#pragma once

#include <array>
#include <cstdint>

namespace esper {

enum class State : std::uint8_t {
  kDormant = 0,
  kGerminated = 1,
  kTraining = 2,
  kGrafting = 3,
  kStabilization = 4,
  kEvaluating = 5,
  kFineTuning = 6,
  kFossilized = 7,
  kCulled = 8,
  kCancelled = 9,
  kRolledBack = 10,
};

inline constexpr int kNumStates = 11;

inline constexpr std::array<const char*, kNumStates> kStateNames = {
    "DORMANT",     "GERMINATED",  "TRAINING", "GRAFTING",  "STABILIZATION", "EVALUATING",
    "FINE_TUNING", "FOSSILIZED", "CULLED",   "CANCELLED", "ROLLED_BACK",
};

// Whether a seed may go from `from` to `to`. The way back to DORMANT is also subject to the embargo,
// which SeedBank counts.
constexpr bool legal_move(State from, State to) {
  const auto f = static_cast<int>(from);
  switch (to) {
    case State::kDormant:
      return from == State::kCulled || from == State::kCancelled || from == State::kRolledBack;
    case State::kGrafting:
      return from == State::kTraining || from == State::kEvaluating;
    case State::kFossilized:
      return from == State::kFineTuning || from == State::kEvaluating;
    case State::kCancelled:
      return from == State::kGerminated || from == State::kTraining;
    case State::kCulled:
    case State::kRolledBack:
      return f >= static_cast<int>(State::kTraining) && f <= static_cast<int>(State::kFineTuning);
    default:  // GERMINATED, TRAINING, STABILIZATION, EVALUATING, FINE_TUNING: from the state before
      return f + 1 == static_cast<int>(to);
  }
}

inline constexpr const char* name_of(State state) {
  return kStateNames[static_cast<std::size_t>(state)];
}

// States in which a seed's function is computed at all.
constexpr bool computes(State state) {
  return state >= State::kTraining && state <= State::kFossilized;
}

}  // namespace esper
