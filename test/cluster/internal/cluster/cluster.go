// Package cluster brings the test site up and down: what is shared (wan,
// laptop, lan) and the Kubernetes clusters plugged into it.
package cluster

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/test/cluster/internal/machine"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

// Site does the work on a planned site.
type Site struct {
	*plan.Site
	Out   io.Writer // progress
	begun time.Time
}

// New returns a site whose progress is told on out.
func New(s *plan.Site, out io.Writer) *Site { return &Site{s, out, time.Now()} }

func (s *Site) say(format string, args ...any) {
	fmt.Fprintf(s.Out, "%6.1fs  "+format+"\n", append([]any{time.Since(s.begun).Seconds()}, args...)...)
}

// lock keeps two commands from changing the site at once. The lock ends with
// the process at the latest.
func (s *Site) lock() (unlock func(), err error) {
	path := filepath.Join(s.State, "lock")
	for {
		if err := os.MkdirAll(s.State, 0o755); err != nil {
			return nil, fmt.Errorf("make the state directory: %w", err)
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			return nil, fmt.Errorf("open the lock: %w", err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		// "down" removes the file: what we hold may be a file without a name.
		mine, err1 := f.Stat()
		named, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(mine, named) {
			return func() { f.Close() }, nil
		}
		f.Close()
	}
}

// marker is a file that says that something was built to its end.
func marker(dir string) string { return filepath.Join(dir, "complete") }

func complete(dir string) bool {
	_, err := os.Stat(marker(dir))
	return err == nil
}

func setComplete(dir string) error {
	if err := os.WriteFile(marker(dir), nil, 0o644); err != nil {
		return fmt.Errorf("mark %s as complete: %w", dir, err)
	}
	return nil
}

// spec loads a machine's spec, if it has one.
func (s *Site) spec(cluster, name string) (*machine.Spec, error) {
	return machine.Load((&machine.Spec{Dir: s.MachineDir(cluster, name)}).Path())
}

// alive says whether a machine runs.
func (s *Site) alive(cluster, name string) bool {
	m, err := s.spec(cluster, name)
	return err == nil && machine.Alive(m) != 0
}

// present lists the clusters that have been brought up to their end.
func (s *Site) present() []*plan.Cluster {
	var cs []*plan.Cluster
	for _, c := range plan.All() {
		if complete(s.ClusterDir(c.Name)) {
			cs = append(cs, c)
		}
	}
	return cs
}
