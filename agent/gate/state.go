package gate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// maxState bounds an encoded state, in bytes: as much as a ConfigMap may hold.
const maxState = 1 << 20

// entrySuffix ends the ConfigMap's keys of entries; the rest is the Entry's key.
const entrySuffix = ".json"

// parseState reads a state that was pushed or kept, and checks what this gate
// would serve of it.
func (g *Gate) parseState(b []byte) (s intercept.State, err error) {
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("reading a state: %w", err)
	}
	if s.Generation <= 0 {
		return s, fmt.Errorf("reading a state: generation %d is not above 0", s.Generation)
	}
	entries := make(map[string]intercept.Entry, len(s.Entries))
	for key, e := range s.Entries {
		entries[strings.TrimSuffix(key, entrySuffix)] = e
	}
	s.Entries = entries
	return s, g.checkState(s)
}

// checkState tells what cannot be served. Entries of other gates are theirs. A
// member of a mesh that cannot be served is left out instead: see tableLocked.
func (g *Gate) checkState(s intercept.State) error {
	for key, e := range s.Entries {
		if e.Gate != g.cfg.Name {
			continue
		}
		for _, r := range e.Routes {
			if err := checkRoute(r); err != nil {
				return fmt.Errorf("reading a state: %s, port %d: %w", key, r.Port, err)
			}
		}
	}
	return nil
}

func checkRoute(r intercept.Route) error {
	if r.Listen == 0 {
		return errors.New("no port to listen at")
	}
	if r.Protocol != protocolTCP && r.Protocol != protocolUDP {
		return fmt.Errorf("protocol %q is neither TCP nor UDP", r.Protocol)
	}
	if r.Origin != "" {
		if _, _, err := net.SplitHostPort(r.Origin); err != nil {
			return fmt.Errorf("origin %q: %w", r.Origin, err)
		}
	}
	if r.Machine == nil {
		return nil
	}
	return checkMachine(*r.Machine)
}

// readMounted reads the mounted ConfigMap. The kubelet swaps the link ..data, so
// that what lies behind it is of one generation as long as it is there.
func (g *Gate) readMounted() (s intercept.State, err error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(g.cfg.StateDir, "..data"))
	if errors.Is(err, fs.ErrNotExist) {
		dir, err = g.cfg.StateDir, nil // a plain folder
	}
	if err != nil {
		return s, err
	}
	b, err := os.ReadFile(filepath.Join(dir, "generation"))
	if err != nil {
		return s, err
	}
	s.Generation, err = strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return s, fmt.Errorf("the generation: %w", err)
	}
	g.mu.Lock()
	known := g.loaded && s.Generation <= g.state.Generation
	g.mu.Unlock()
	if known {
		return s, nil // the entries are of no interest
	}
	names, err := os.ReadDir(dir)
	if err != nil {
		return s, err
	}
	s.Entries = map[string]intercept.Entry{}
	size := 0
	for _, d := range names {
		key, is := strings.CutSuffix(d.Name(), entrySuffix)
		if !is || strings.HasPrefix(key, ".") {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, d.Name()))
		if err != nil {
			return s, err
		}
		if size += len(b); size > maxState {
			return s, fmt.Errorf("more than %d bytes", maxState)
		}
		var e intercept.Entry
		if err := json.Unmarshal(b, &e); err != nil {
			return s, fmt.Errorf("%s: %w", d.Name(), err)
		}
		s.Entries[key] = e
	}
	return s, g.checkState(s)
}

// loadMounted takes the mounted state if it is newer, and is silent about a
// problem that it told of before.
func (g *Gate) loadMounted() (problem string) {
	s, err := g.readMounted()
	if err != nil {
		return fmt.Sprintf("reading the state of %s: %v", g.cfg.StateDir, err)
	}
	g.take(s)
	return ""
}

// loadKept takes what was pushed before the container was restarted.
func (g *Gate) loadKept() {
	b, err := os.ReadFile(g.cfg.KeepFile)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var s intercept.State
	if err == nil {
		s, err = g.parseState(b)
	}
	if err != nil {
		g.log.Warn("the kept state is of no use", "file", g.cfg.KeepFile, "error", err)
		return
	}
	g.take(s)
}

// keep writes a pushed state where a restarted container finds it.
func (g *Gate) keep(s intercept.State) error {
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("keeping the state: %w", err)
	}
	// Not there yet is the same as there with the same bytes.
	if old, _ := os.ReadFile(g.cfg.KeepFile); bytes.Equal(old, b) {
		return nil
	}
	f, err := os.CreateTemp(filepath.Dir(g.cfg.KeepFile), ".state-*")
	if err != nil {
		return fmt.Errorf("keeping the state: %w", err)
	}
	_, err = f.Write(b)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), g.cfg.KeepFile)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("keeping the state: %w", err)
	}
	return nil
}

// take puts s in force if it is newer than what is.
func (g *Gate) take(s intercept.State) (taken bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.loaded && s.Generation <= g.state.Generation || g.life.Err() != nil {
		return false
	}
	g.state, g.loaded = s, true
	g.applyLocked()
	g.log.Info("state", "generation", s.Generation, "routes", len(g.routes), "failed", len(g.failed))
	return true
}

// follow looks at the mounted files now and then, and tries again to listen where
// that failed.
func (g *Gate) follow(ctx context.Context) {
	t := time.NewTicker(g.times.reload)
	defer t.Stop()
	var told string
	for {
		problem := g.loadMounted()
		if problem != "" && problem != told {
			g.log.Warn(problem)
		}
		told = problem
		g.mu.Lock()
		if len(g.failed) > 0 {
			g.applyLocked()
		}
		g.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}
