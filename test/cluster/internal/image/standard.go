package image

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

// applets are the commands that the busybox image has.
var applets = []string{
	"sh", "ls", "cat", "ps", "wget", "nslookup", "nc", "ping", "ip", "id", "env", "sleep",
	"head", "dd", "top", "netstat", "vi", "grep", "true", "false", "echo", "test", "stat",
}

// Standard writes the images that every node holds into a directory.
func Standard(bin, out string) error {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("find busybox (Debian: busybox-static): %w", err)
	}
	shell := []string{busybox + "=/bin/busybox"}
	for _, a := range applets {
		shell = append(shell, "->busybox=/bin/"+a)
	}
	in := func(name string) []string { return []string{filepath.Join(bin, name) + "=/" + name} }
	if err := os.MkdirAll(out, 0o755); err != nil {
		return fmt.Errorf("make the image directory: %w", err)
	}
	for file, i := range map[string]Image{
		"pause":   {Name: plan.PauseImage, Entrypoint: []string{"/pause"}, User: "65535:65535", Files: in("pause")},
		"coredns": {Name: plan.CoreDNSImage, Entrypoint: []string{"/coredns"}, Files: in("coredns")},
		"testapp": {Name: plan.TestappImage, Entrypoint: []string{"/testapp"}, Command: []string{"serve"}, User: "65534:65534", Files: in("testapp")},
		"busybox": {Name: plan.BusyboxImage, Command: []string{"sh"}, Files: shell},
	} {
		if err := i.Write(filepath.Join(out, file+".tar")); err != nil {
			return err
		}
	}
	return nil
}
