// All seeds of a model: lifecycle state, alpha schedule, the three scalars that the kernels read, and the
// plan that tells them what each seed computes. Structure of arrays, so that a tick over many seeds is one
// pass and views cost nothing.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ops/plan.h"
#include "seedbank/lifecycle.h"
#include "seedbank/schedule.h"

namespace esper {

class SeedBank {
 public:
  // Throws std::invalid_argument unless there is at least one slot and every slot has a seed.
  SeedBank(const std::vector<std::int64_t>& seeds_per_slot, std::int64_t embargo_steps);

  std::int64_t num_seeds() const { return static_cast<std::int64_t>(states_.size()); }
  std::int64_t num_slots() const { return static_cast<std::int64_t>(first_.size()) - 1; }
  std::int64_t embargo_steps() const { return embargo_steps_; }

  // Flat index of a seed. Throws std::invalid_argument for a slot or seed that does not exist.
  std::size_t index(std::int64_t slot, std::int64_t seed) const;

  State state(std::size_t i) const { return static_cast<State>(states_[i]); }
  float alpha(std::size_t i) const { return alphas_[i]; }
  bool muted(std::size_t i) const { return muted_[i] != 0; }
  bool frozen(std::size_t i) const { return frozen_[i] != 0; }
  std::int64_t embargo_remaining(std::size_t i) const { return embargo_[i]; }

  // Moves a seed. An illegal or embargoed move throws std::invalid_argument and changes nothing.
  void advance(std::size_t i, std::int64_t to);

  void set_schedule(std::size_t i, std::string_view kind, std::int64_t steps, double start, double end,
                    double tolerance);
  // Says how far the host's output has moved lately, where the seed sits; its drift-controlled ramp heeds it.
  void set_drift(std::size_t i, double cosine, double norm);
  // The seeds of a slot whose drift-controlled ramp is under way. Throws std::invalid_argument for a slot
  // that does not exist.
  std::vector<std::int64_t> drift_ramps(std::int64_t slot) const;
  void set_alpha(std::size_t i, double alpha);
  void set_frozen(std::size_t i, bool frozen);
  void set_muted(std::size_t i, bool muted);
  // Keeps an emptied seed from becoming DORMANT for so many steps more.
  void set_embargo(std::size_t i, std::int64_t steps);

  // Says what the native kernel of a seed computes: its record of the plan, whose row and first_param the
  // bank fills in. It is forgotten when the seed becomes DORMANT, and follows from the seed's kernel, so it
  // is not part of the bytes. An empty one says that no native kernel computes it. Throws
  // std::invalid_argument for another number of fields or an empty chunk.
  void set_plan(std::size_t i, const std::vector<std::int64_t>& record);
  // The records of the seeds of a slot that compute now and have one, one after the other. Throws
  // std::invalid_argument for a slot that does not exist.
  std::vector<std::int64_t> plan(std::int64_t slot) const;

  // Advances every running schedule and embargo by one step; returns the flat indices of the seeds
  // whose schedule came to its end in this step.
  std::vector<std::int64_t> tick();

  std::string to_bytes() const;
  // Throws std::invalid_argument for anything that to_bytes did not write.
  static SeedBank from_bytes(std::string_view bytes);

  // Memory that stays where it is for the life of the bank.
  float* scalars() { return scalars_.data(); }  // [num_seeds, 3]: alpha_fwd, alpha_bwd, gamma
  const std::uint8_t* states() const { return states_.data(); }
  const float* alphas() const { return alphas_.data(); }
  const float* progress() const { return progress_.data(); }
  const std::int64_t* embargoes() const { return embargo_.data(); }
  const std::int64_t* plans() const { return plans_.data(); }  // [num_seeds, kPlanWidth]; zeros: none

 private:
  SeedBank() = default;
  void allocate(std::size_t seeds);
  std::size_t checked_slot(std::int64_t slot) const;
  void forget(std::size_t i);          // what a seed that left its place leaves behind: nothing
  void start_schedule(std::size_t i);  // from its beginning
  void refresh(std::size_t i);         // alpha and scalars from state, schedule and flags

  std::vector<std::int64_t> first_;  // [num_slots + 1]: flat index of the first seed of each slot
  std::int64_t embargo_steps_ = 0;

  std::vector<std::uint8_t> states_;
  std::vector<std::uint8_t> kind_;
  std::vector<std::uint8_t> held_;  // alpha was set by hand; the schedule stands still
  std::vector<std::uint8_t> frozen_;
  std::vector<std::uint8_t> muted_;
  std::vector<std::int64_t> steps_;
  std::vector<std::int64_t> embargo_;
  std::vector<double> elapsed_;  // steps of the schedule done; fractional only under drift control
  std::vector<double> begin_;    // alpha at elapsed = 0; differs from start_ after EVALUATING -> GRAFTING
  std::vector<double> start_;
  std::vector<double> end_;
  std::vector<double> tolerance_;
  std::vector<double> drift_cosine_;
  std::vector<double> drift_norm_;
  std::vector<float> alphas_;
  std::vector<float> progress_;
  std::vector<float> scalars_;
  std::vector<std::int64_t> plans_;
};

}  // namespace esper
