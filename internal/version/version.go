// Package version holds the version that every Culvert program reports. The
// session and its agent must speak the same protocol; see wire/carrier.
package version

// Version is set by the Makefile with -ldflags -X; "dev" in an ad-hoc build.
var Version = "dev"
