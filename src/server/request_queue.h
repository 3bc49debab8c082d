#ifndef TWILIGHT_SERVER_REQUEST_QUEUE_H_
#define TWILIGHT_SERVER_REQUEST_QUEUE_H_

#include <cstddef>
#include <deque>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace twilight::server {

/// Waiting items, taken in turn between clients and in order of arrival within one: a client with
/// many requests delays another by one of them at most. Not thread-safe.
template <typename T>
class FairQueue {
 public:
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] bool empty() const { return size_ == 0; }

  void push(const std::string& client, T item) { line_of(client).push_back(std::move(item)); }
  /// Before the client's other items, and the client before others.
  void push_first(const std::string& client, T item) {
    line_of(client).push_front(std::move(item));
    for (auto it = lines_.begin(); it != lines_.end(); ++it) {
      if (it->first == client) {
        lines_.splice(lines_.begin(), lines_, it);
        break;
      }
    }
  }
  /// The next item; there must be one.
  [[nodiscard]] T& front() { return lines_.front().second.front(); }
  /// Takes the next item out; its client then goes behind the others.
  T pop() {
    auto line = lines_.begin();
    T item = std::move(line->second.front());
    line->second.pop_front();
    --size_;
    if (line->second.empty()) {
      lines_.erase(line);
    } else {
      lines_.splice(lines_.end(), lines_, line);
    }
    return item;
  }
  /// Takes out every item that `match` accepts.
  template <typename Match>
  std::vector<T> extract(const Match& match) {
    std::vector<T> taken;
    for (auto line = lines_.begin(); line != lines_.end();) {
      for (auto it = line->second.begin(); it != line->second.end();) {
        if (match(*it)) {
          taken.push_back(std::move(*it));
          it = line->second.erase(it);
          --size_;
        } else {
          ++it;
        }
      }
      line = line->second.empty() ? lines_.erase(line) : std::next(line);
    }
    return taken;
  }

 private:
  std::deque<T>& line_of(const std::string& client) {
    ++size_;
    for (auto& [name, items] : lines_) {
      if (name == client) return items;
    }
    lines_.emplace_back(client, std::deque<T>{});
    return lines_.back().second;
  }

  std::list<std::pair<std::string, std::deque<T>>> lines_;
  std::size_t size_ = 0;
};

}  // namespace twilight::server

#endif  // TWILIGHT_SERVER_REQUEST_QUEUE_H_
