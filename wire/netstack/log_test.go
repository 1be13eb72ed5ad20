package netstack

import (
	"bytes"
	"log/slog"
	"os"
	"strings"
	"testing"

	"gvisor.dev/gvisor/pkg/log"
)

func TestLogTo(t *testing.T) {
	defer log.SetTarget(log.GoogleEmitter{Writer: &log.Writer{Next: os.Stderr}})
	for level, want := range map[slog.Level]string{slog.LevelDebug: "port 7 is odd", slog.LevelInfo: ""} {
		var out bytes.Buffer
		LogTo(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: level})))
		log.Warningf("port %d is odd", 7)
		if !strings.Contains(out.String(), want) || want == "" && out.Len() > 0 {
			t.Errorf("at %v: %q", level, out.String())
		}
	}
}
