package daemon

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/culvert-dev/culvert/daemon/api"
)

// notify tells the service manager a state (sd_notify(3)); without one it does
// nothing.
func notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	if strings.HasPrefix(path, "@") {
		path = "\x00" + path[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	c.Write([]byte(state))
}

// summary is what `systemctl status` shows.
func (v *supervisor) summary() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	up := 0
	for _, s := range v.sessions {
		if s.snapshot().State == api.Connected {
			up++
		}
	}
	return fmt.Sprintf("%d sessions, %d connected", len(v.sessions), up)
}

// notifyStatus keeps the summary current until ctx ends.
func (v *supervisor) notifyStatus(ctx context.Context) {
	w := v.watch(func(*api.Session) bool { return true })
	defer v.unwatch(w)
	for w.next(ctx) != nil {
		notify("STATUS=" + v.summary())
	}
}
