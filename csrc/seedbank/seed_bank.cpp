#include "seedbank/seed_bank.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace esper {
namespace {

constexpr std::int64_t kMaxSeeds = std::int64_t{1} << 24;
constexpr std::int64_t kMaxSteps = std::int64_t{1} << 52;  // exact as a double

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

void require_fraction(const char* name, double value) {
  if (!(value >= 0.0 && value <= 1.0)) refuse(name, " is ", value, " but must be in [0, 1]");
}

void require_drift(const char* name, double value) {
  if (!(value >= 0.0 && value <= std::numeric_limits<float>::max())) {
    refuse(name, " is ", value, " but must be finite and not negative");
  }
}

}  // namespace

SeedBank::SeedBank(const std::vector<std::int64_t>& seeds_per_slot, std::int64_t embargo_steps)
    : embargo_steps_(embargo_steps) {
  if (embargo_steps < 0 || embargo_steps > kMaxSteps) {
    refuse("embargo_steps is ", embargo_steps, " but must be in [0, 2**52]");
  }
  first_.push_back(0);
  for (std::size_t slot = 0; slot < seeds_per_slot.size(); ++slot) {
    const auto count = seeds_per_slot[slot];
    if (count < 1 || count > kMaxSeeds) {
      refuse("seeds_per_slot[", slot, "] is ", count, " but must be in [1, 2**24]");
    }
    first_.push_back(first_.back() + count);
    if (first_.back() > kMaxSeeds) refuse("seeds_per_slot names more than 2**24 seeds in all");
  }
  if (first_.back() == 0) refuse("seeds_per_slot is empty but must name at least one slot");
  allocate(static_cast<std::size_t>(first_.back()));
}

void SeedBank::allocate(std::size_t seeds) {
  for (auto* column : {&states_, &kind_, &held_, &frozen_, &muted_}) column->resize(seeds);
  for (auto* column : {&steps_, &embargo_}) column->resize(seeds);
  for (auto* column : {&elapsed_, &begin_, &start_, &end_, &tolerance_, &drift_cosine_, &drift_norm_}) {
    column->resize(seeds);
  }
  alphas_.resize(seeds);
  progress_.resize(seeds);
  scalars_.resize(3 * seeds);
  plans_.resize(kPlanWidth * seeds);
  for (std::size_t i = 0; i < seeds; ++i) forget(i);
}

std::size_t SeedBank::checked_slot(std::int64_t slot) const {
  if (slot < 0 || slot >= num_slots()) {
    refuse("slot is ", slot, " but must be in [0, ", num_slots(), ")");
  }
  return static_cast<std::size_t>(slot);
}

std::size_t SeedBank::index(std::int64_t slot, std::int64_t seed) const {
  const auto s = checked_slot(slot);
  const auto count = first_[s + 1] - first_[s];
  if (seed < 0 || seed >= count) {
    refuse("seed is ", seed, " but slot ", slot, " has seeds in [0, ", count, ")");
  }
  return static_cast<std::size_t>(first_[s] + seed);
}

void SeedBank::forget(std::size_t i) {
  kind_[i] = static_cast<std::uint8_t>(ScheduleKind::kLinear);
  held_[i] = frozen_[i] = muted_[i] = 0;
  steps_[i] = 1;
  embargo_[i] = 0;
  elapsed_[i] = begin_[i] = start_[i] = 0.0;
  end_[i] = 1.0;
  tolerance_[i] = 1.0;
  drift_cosine_[i] = drift_norm_[i] = 0.0;
  std::fill_n(&plans_[kPlanWidth * i], kPlanWidth, 0);
  refresh(i);
}

void SeedBank::start_schedule(std::size_t i) {
  held_[i] = 0;
  elapsed_[i] = 0.0;
}

void SeedBank::refresh(std::size_t i) {
  const State now = state(i);
  const double progress = std::min(1.0, elapsed_[i] / static_cast<double>(steps_[i]));
  progress_[i] = static_cast<float>(progress);
  if (now == State::kGrafting) {
    if (!held_[i]) {  // a held alpha is already in place
      const double shape = schedule_shape(static_cast<ScheduleKind>(kind_[i]), progress);
      const double alpha = shape >= 1.0 ? end_[i] : begin_[i] + (end_[i] - begin_[i]) * shape;
      alphas_[i] = static_cast<float>(alpha);
    }
  } else {
    alphas_[i] = now >= State::kStabilization && now <= State::kFossilized ? 1.0f : 0.0f;
  }
  float forward = 0.0f, backward = 0.0f, gamma = 0.0f;
  switch (now) {
    case State::kTraining:
      backward = 1.0f;
      break;
    case State::kGrafting:
      forward = backward = gamma = alphas_[i];
      break;
    case State::kStabilization:
    case State::kEvaluating:
      forward = gamma = 1.0f;
      break;
    case State::kFineTuning:
      forward = backward = gamma = 1.0f;
      break;
    case State::kFossilized:
      forward = gamma = 1.0f;
      backward = frozen_[i] ? 0.0f : 1.0f;
      break;
    default:
      break;
  }
  float* row = &scalars_[3 * i];
  row[0] = muted_[i] ? 0.0f : forward;
  row[1] = backward;
  row[2] = gamma;
}

void SeedBank::advance(std::size_t i, std::int64_t to) {
  const State from = state(i);
  if (to < 0 || to >= kNumStates) {
    refuse("to_state is ", to, " but must be in [0, ", kNumStates, "); the seed is ", name_of(from));
  }
  const auto next = static_cast<State>(to);
  if (!legal_move(from, next)) {
    refuse("a seed cannot go from ", name_of(from), " to ", name_of(next));
  }
  if (next == State::kDormant) {
    if (embargo_[i] > 0) {
      refuse("a seed cannot go from ", name_of(from), " to ", name_of(next), " for another ", embargo_[i],
             " steps: its place is under embargo");
    }
    states_[i] = static_cast<std::uint8_t>(next);
    forget(i);
    return;
  }
  if (next == State::kGrafting) {
    begin_[i] = from == State::kEvaluating ? static_cast<double>(alphas_[i]) : start_[i];
    start_schedule(i);
  }
  if (next == State::kCulled || next == State::kCancelled || next == State::kRolledBack) {
    embargo_[i] = embargo_steps_;
  }
  states_[i] = static_cast<std::uint8_t>(next);
  refresh(i);
}

void SeedBank::set_schedule(std::size_t i, std::string_view kind, std::int64_t steps, double start,
                            double end, double tolerance) {
  const auto* found = std::find(kScheduleNames.begin(), kScheduleNames.end(), kind);
  if (found == kScheduleNames.end()) {
    refuse("kind is '", kind, "' but must be one of linear, cosine, sigmoid, drift");
  }
  if (steps < 1 || steps > kMaxSteps) refuse("steps is ", steps, " but must be in [1, 2**52]");
  require_fraction("start", start);
  require_fraction("end", end);
  if (!(tolerance > 0.0 && tolerance <= std::numeric_limits<float>::max())) {
    refuse("tolerance is ", tolerance, " but must be finite and above 0");
  }
  kind_[i] = static_cast<std::uint8_t>(found - kScheduleNames.begin());
  steps_[i] = steps;
  start_[i] = begin_[i] = start;
  end_[i] = end;
  tolerance_[i] = tolerance;
  start_schedule(i);
  refresh(i);
}

void SeedBank::set_drift(std::size_t i, double cosine, double norm) {
  require_drift("cosine", cosine);
  require_drift("norm", norm);
  drift_cosine_[i] = cosine;
  drift_norm_[i] = norm;
}

std::vector<std::int64_t> SeedBank::drift_ramps(std::int64_t slot) const {
  const auto s = checked_slot(slot);
  std::vector<std::int64_t> seeds;
  for (auto i = static_cast<std::size_t>(first_[s]); i < static_cast<std::size_t>(first_[s + 1]); ++i) {
    const bool under_way =
        state(i) == State::kGrafting && !held_[i] && elapsed_[i] < static_cast<double>(steps_[i]);
    if (under_way && kind_[i] == static_cast<std::uint8_t>(ScheduleKind::kDrift)) {
      seeds.push_back(static_cast<std::int64_t>(i) - first_[s]);
    }
  }
  return seeds;
}

void SeedBank::set_alpha(std::size_t i, double alpha) {
  if (state(i) != State::kGrafting) {
    refuse("alpha can be set in GRAFTING only; the seed is ", name_of(state(i)));
  }
  require_fraction("alpha", alpha);
  held_[i] = 1;
  alphas_[i] = static_cast<float>(alpha);
  refresh(i);
}

void SeedBank::set_frozen(std::size_t i, bool frozen) {
  frozen_[i] = frozen;
  refresh(i);
}

void SeedBank::set_muted(std::size_t i, bool muted) {
  muted_[i] = muted;
  refresh(i);
}

void SeedBank::set_embargo(std::size_t i, std::int64_t steps) {
  if (steps < 0 || steps > kMaxSteps) refuse("embargo is ", steps, " steps but must be in [0, 2**52]");
  if (const State at = state(i); !legal_move(at, State::kDormant)) {
    refuse("a seed that is ", name_of(at), " cannot be put under embargo: only an emptied one can");
  }
  embargo_[i] = steps;
}

void SeedBank::set_plan(std::size_t i, const std::vector<std::int64_t>& record) {
  auto* own = &plans_[kPlanWidth * i];
  if (record.empty()) {
    std::fill_n(own, kPlanWidth, 0);
    return;
  }
  if (record.size() != kPlanWidth) {
    refuse("record has ", record.size(), " fields but must have ", kPlanWidth);
  }
  if (record[kPlanWidthOfChunk] < 1) {
    refuse("record names a chunk of width ", record[kPlanWidthOfChunk], " but must name at least 1");
  }
  std::copy(record.begin(), record.end(), own);
  own[kPlanRow] = static_cast<std::int64_t>(i);
  own[kPlanFirstParam] = 0;
}

std::vector<std::int64_t> SeedBank::plan(std::int64_t slot) const {
  const auto s = checked_slot(slot);
  const auto begin = static_cast<std::size_t>(first_[s]), end = static_cast<std::size_t>(first_[s + 1]);
  std::vector<std::int64_t> records;
  records.reserve(kPlanWidth * (end - begin));
  std::int64_t next_param = 0;
  for (std::size_t i = begin; i < end; ++i) {
    const auto* own = &plans_[kPlanWidth * i];
    if (!computes(state(i)) || own[kPlanWidthOfChunk] == 0) continue;
    records.insert(records.end(), own, own + kPlanWidth);
    (records.end() - kPlanWidth)[kPlanFirstParam] = next_param;
    next_param += num_params(own);
  }
  return records;
}

std::vector<std::int64_t> SeedBank::tick() {
  std::vector<std::int64_t> completed;
  const std::size_t seeds = states_.size();
  for (std::size_t i = 0; i < seeds; ++i) {
    if (state(i) == State::kGrafting && !held_[i]) {
      const auto length = static_cast<double>(steps_[i]);
      if (elapsed_[i] >= length) continue;
      elapsed_[i] += kind_[i] == static_cast<std::uint8_t>(ScheduleKind::kDrift)
                         ? drift_rate(drift_cosine_[i], drift_norm_[i], tolerance_[i])
                         : 1.0;
      refresh(i);
      if (elapsed_[i] >= length) completed.push_back(static_cast<std::int64_t>(i));
    } else if (embargo_[i] > 0) {
      --embargo_[i];
    }
  }
  return completed;
}

}  // namespace esper
