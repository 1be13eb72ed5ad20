package netstack

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"gvisor.dev/gvisor/pkg/log"
)

// LogTo sends what gVisor says, which it does for the whole process and to the
// standard error output otherwise, to l at level debug: it is about packets, for
// who looks into one.
func LogTo(l *slog.Logger) {
	level := log.Warning
	if l.Enabled(context.Background(), slog.LevelDebug) {
		level = log.Debug
	}
	log.SetLevel(level)
	log.SetTarget(emitter{l})
}

type emitter struct{ log *slog.Logger }

// Emit implements gVisor's log.Emitter.
func (e emitter) Emit(_ int, level log.Level, _ time.Time, format string, v ...any) {
	if e.log.Enabled(context.Background(), slog.LevelDebug) {
		e.log.Debug("gvisor", "level", level.String(), "said", fmt.Sprintf(format, v...))
	}
}
