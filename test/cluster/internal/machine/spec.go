// Package machine runs a box of the test site: a tree of processes with
// namespaces, control groups and a root file system of its own.
//
// A machine is started in two steps. Start (still on the host) joins the
// control groups and the network namespace and clones the second step into
// new mount, PID, UTS, IPC and cgroup namespaces. Inside builds the root file
// system and stays as the machine's PID 1: it starts and restarts the
// components. Killing it is the tear-down: the kernel ends everything else.
package machine

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// Process is a component that PID 1 keeps running.
type Process struct {
	Name    string   `json:"name"`
	Args    []string `json:"args"` // Args[0] is looked up in PATH
	WaitFor string   `json:"waitFor,omitempty"`
}

// Spec describes a machine. It is a file in the machine's state directory.
type Spec struct {
	Name      string            `json:"name"`  // host name
	Group     string            `json:"group"` // name of its control groups
	Netns     string            `json:"netns"` // file of its network namespace
	Dir       string            `json:"dir"`   // its state directory
	Bin       string            `json:"bin"`   // directory of the binaries, first in PATH
	Share     []string          `json:"share"` // directories of the host it sees at the same path
	Files     map[string]string `json:"files"` // files written into its root
	Node      bool              `json:"node"`  // it runs containerd and a kubelet
	Processes []Process         `json:"processes"`
}

// Path is the spec's file.
func (s *Spec) Path() string { return filepath.Join(s.Dir, "machine.json") }

// PIDFile holds the host's PID of the machine's PID 1.
func (s *Spec) PIDFile() string { return filepath.Join(s.Dir, "pid") }

// LogDir holds one log per component.
func (s *Spec) LogDir() string { return filepath.Join(s.Dir, "log") }

// Save writes the spec's file.
func (s *Spec) Save() error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("encode machine %s: %w", s.Name, err)
	}
	if err := os.MkdirAll(s.LogDir(), 0o755); err != nil {
		return fmt.Errorf("make the log directory of %s: %w", s.Name, err)
	}
	if err := os.WriteFile(s.Path(), b, 0o644); err != nil {
		return fmt.Errorf("save machine %s: %w", s.Name, err)
	}
	return nil
}

// Load reads a spec's file.
func Load(path string) (*Spec, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("load a machine: %w", err)
	}
	s := &Spec{}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("load machine %s: %w", path, err)
	}
	return s, nil
}
