// The bank as bytes: magic, version, length, payload, checksum; all little-endian.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "seedbank/seed_bank.h"

namespace esper {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is written as memory lies");

constexpr std::string_view kMagic = "ESPERSB\n";
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kHeaderBytes = kMagic.size() + sizeof(std::uint32_t) + sizeof(std::uint64_t);
constexpr std::size_t kChecksumBytes = sizeof(std::uint64_t);

[[noreturn]] void corrupt(const std::string& rule) {
  throw std::invalid_argument("seed bank bytes are not usable: " + rule);
}

// FNV-1a, 64 bits. Guards against damage, not against intent.
std::uint64_t checksum(std::string_view bytes) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  return hash;
}

class Writer {
 public:
  template <class T>
  void value(const T& item) {
    static_assert(std::is_trivially_copyable_v<T>);
    bytes.append(reinterpret_cast<const char*>(&item), sizeof(T));
  }
  template <class T>
  void column(const std::vector<T>& items) {
    bytes.append(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T));
  }
  std::string bytes;
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}
  template <class T>
  T value() {
    T item;
    copy(&item, sizeof(T));
    return item;
  }
  template <class T>
  void column(std::vector<T>& items) {
    copy(items.data(), items.size() * sizeof(T));
  }
  std::size_t left() const { return rest_.size(); }

 private:
  void copy(void* to, std::size_t count) {
    if (rest_.size() < count) corrupt("they end too early");
    std::memcpy(to, rest_.data(), count);
    rest_.remove_prefix(count);
  }
  std::string_view rest_;
};

template <class T, class Rule>
void require_all(const char* name, const std::vector<T>& items, Rule rule) {
  for (const T& item : items) {
    if (!rule(item)) corrupt(std::string(name) + " holds " + std::to_string(item));
  }
}

}  // namespace

std::string SeedBank::to_bytes() const {
  Writer payload;
  payload.value(embargo_steps_);
  payload.value(num_slots());
  payload.column(first_);
  for (const auto* column : {&states_, &kind_, &held_, &frozen_, &muted_}) payload.column(*column);
  for (const auto* column : {&steps_, &embargo_}) payload.column(*column);
  for (const auto* column :
       {&elapsed_, &begin_, &start_, &end_, &tolerance_, &drift_cosine_, &drift_norm_}) {
    payload.column(*column);
  }
  payload.column(alphas_);
  Writer whole;
  whole.bytes.assign(kMagic);
  whole.value(kVersion);
  whole.value(static_cast<std::uint64_t>(payload.bytes.size()));
  whole.bytes += payload.bytes;
  whole.value(checksum(whole.bytes));
  return std::move(whole.bytes);
}

SeedBank SeedBank::from_bytes(std::string_view bytes) {
  if (bytes.size() < kHeaderBytes + kChecksumBytes) corrupt("they are shorter than a header");
  if (bytes.substr(0, kMagic.size()) != kMagic) corrupt("they do not start as a seed bank does");
  Reader header(bytes.substr(kMagic.size()));
  const auto version = header.value<std::uint32_t>();
  if (version != kVersion) {
    corrupt("their version is " + std::to_string(version) + " and this build reads " +
            std::to_string(kVersion));
  }
  if (header.value<std::uint64_t>() != bytes.size() - kHeaderBytes - kChecksumBytes) {
    corrupt("their length differs from the length that they name");
  }
  const auto body = bytes.substr(0, bytes.size() - kChecksumBytes);
  if (Reader(bytes.substr(body.size())).value<std::uint64_t>() != checksum(body)) {
    corrupt("the checksum differs");
  }

  Reader in(body.substr(kHeaderBytes));
  SeedBank bank;
  bank.embargo_steps_ = in.value<std::int64_t>();
  const auto slots = in.value<std::int64_t>();
  if (slots < 1 || static_cast<std::uint64_t>(slots) >= in.left() / sizeof(std::int64_t)) {
    corrupt("the number of slots is " + std::to_string(slots));
  }
  bank.first_.resize(static_cast<std::size_t>(slots) + 1);
  in.column(bank.first_);
  for (std::size_t s = 0; s < static_cast<std::size_t>(slots); ++s) {
    if (bank.first_[0] != 0 || bank.first_[s + 1] <= bank.first_[s]) corrupt("a slot has no seed");
  }
  if (static_cast<std::uint64_t>(bank.first_.back()) > in.left()) corrupt("they name too many seeds");
  bank.allocate(static_cast<std::size_t>(bank.first_.back()));
  for (auto* column : {&bank.states_, &bank.kind_, &bank.held_, &bank.frozen_, &bank.muted_}) {
    in.column(*column);
  }
  for (auto* column : {&bank.steps_, &bank.embargo_}) in.column(*column);
  for (auto* column : {&bank.elapsed_, &bank.begin_, &bank.start_, &bank.end_, &bank.tolerance_,
                       &bank.drift_cosine_, &bank.drift_norm_}) {
    in.column(*column);
  }
  in.column(bank.alphas_);
  if (in.left() != 0) corrupt("they hold more than a seed bank");

  const auto fraction = [](double v) { return v >= 0.0 && v <= 1.0; };
  const auto finite = [](double v) { return std::isfinite(v) && v >= 0.0; };
  require_all("state", bank.states_, [](int v) { return v < kNumStates; });
  require_all("schedule kind", bank.kind_, [](int v) { return v < kNumScheduleKinds; });
  require_all("steps", bank.steps_, [](std::int64_t v) { return v >= 1; });
  require_all("embargo", bank.embargo_, [](std::int64_t v) { return v >= 0; });
  require_all("elapsed", bank.elapsed_, finite);
  require_all("begin", bank.begin_, fraction);
  require_all("start", bank.start_, fraction);
  require_all("end", bank.end_, fraction);
  require_all("tolerance", bank.tolerance_, [](double v) { return std::isfinite(v) && v > 0.0; });
  require_all("cosine drift", bank.drift_cosine_, finite);
  require_all("norm drift", bank.drift_norm_, finite);
  require_all("alpha", bank.alphas_, fraction);
  for (std::size_t i = 0; i < bank.states_.size(); ++i) bank.refresh(i);
  return bank;
}

}  // namespace esper
