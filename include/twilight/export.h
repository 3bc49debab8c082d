#ifndef TWILIGHT_EXPORT_H_
#define TWILIGHT_EXPORT_H_

/// Marks the symbols of the public interface; everything else is hidden.
#if defined(__GNUC__)
#define TWILIGHT_API __attribute__((visibility("default")))
#else
#define TWILIGHT_API
#endif

#endif  // TWILIGHT_EXPORT_H_
