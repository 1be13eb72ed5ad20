//go:build unix

package cores

import (
	"syscall"
	"time"
)

// spent is the CPU time of this process so far; false where nobody tells.
func spent() (time.Duration, bool) {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0, false
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), true
}
