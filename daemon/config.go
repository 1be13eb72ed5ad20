package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/router"
	"sigs.k8s.io/yaml"
)

// Defaults of Config.
const (
	DefaultFile        = "/etc/culvert/culvertd.yaml"
	DefaultStateDir    = "/var/lib/culvert"
	DefaultMaxSessions = 16
)

// Config is all that the daemon is told from outside.
type Config struct {
	Socket        string // its folder also holds the lock
	Group         string // may use the daemon, besides root
	SessionBinary string // the culvert program; checked at each start
	StateDir      string // sessions at boot
	MaxSessions   int
	Policy        router.Policy
	Router        router.Env // where the machine's settings are; zero: the real ones
	File          string     // where root's configuration is, for hints
	Debug         bool       // sessions' output goes to the daemon's stderr, too

	// Guard starts the process that gives names back when the daemon dies: a
	// program and its arguments, `culvertd guard` with the daemon's own flags.
	Guard []string

	Log *slog.Logger
}

// File is root's configuration, /etc/culvert/culvertd.yaml. Every field may be
// left out; an unknown one is an error.
type File struct {
	Group       string `json:"group,omitempty"`
	MaxSessions int    `json:"maxSessions,omitempty"`
	// AllowPrefixes and AllowDomains widen what a session may route and resolve.
	AllowPrefixes []netip.Prefix `json:"allowPrefixes,omitempty"`
	AllowDomains  []string       `json:"allowDomains,omitempty"`
}

// maxFile bounds root's configuration, in bytes: a device by mistake has no end.
const maxFile = 1 << 20

// ReadFile reads root's configuration. A missing file is an empty one; one that
// somebody else may write is an error, because it says what sessions may take.
func ReadFile(path string) (File, error) {
	var f File
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	} else if err != nil {
		return f, fmt.Errorf("reading the configuration: %w", err)
	}
	defer file.Close()
	// Of the open file, so that what is checked is what is read.
	st, err := file.Stat()
	if err != nil {
		return f, fmt.Errorf("reading the configuration: %w", err)
	}
	if why := onlyRoots(st); why != "" {
		return f, &api.Error{
			Code:    api.CodeDenied,
			Message: fmt.Sprintf("the configuration %s may not be used: %s", path, why),
			Hint:    "sudo chown root:root " + path + " && sudo chmod 644 " + path,
		}
	}
	text, err := io.ReadAll(io.LimitReader(file, maxFile))
	if err != nil {
		return f, fmt.Errorf("reading the configuration: %w", err)
	}
	if err := yaml.UnmarshalStrict(text, &f); err != nil {
		return f, fmt.Errorf("reading the configuration %s: %w", path, err)
	}
	if f.MaxSessions < 0 || f.MaxSessions > router.MaxSlots {
		return f, fmt.Errorf("reading the configuration %s: maxSessions %d is not between 1 and %d", path, f.MaxSessions, router.MaxSlots)
	}
	return f, nil
}

// complete fills in what was left out.
func (c Config) complete() Config {
	if c.Socket == "" {
		c.Socket = api.DefaultSocket
	}
	if c.Group == "" {
		c.Group = api.Group
	}
	if c.StateDir == "" {
		c.StateDir = DefaultStateDir
	}
	if c.MaxSessions == 0 {
		c.MaxSessions = DefaultMaxSessions
	}
	if c.File == "" {
		c.File = DefaultFile
	}
	if c.Policy.Config == "" {
		c.Policy.Config = c.File
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Router.StateDir == "" {
		c.Router.StateDir = c.StateDir
	}
	if c.Router.Log == nil {
		c.Router.Log = c.Log
	}
	return c
}
