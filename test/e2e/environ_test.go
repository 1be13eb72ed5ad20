//go:build e2e

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/test/netlab"
)

// TestEnv: a workload's environment and files on the developer's machine, as its
// container has them.
func TestEnv(t *testing.T) {
	openShop(t)
	alice := aliceAt(t)
	dir := filepath.Join(lab.Home(netlab.Alice), "mounts")
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := alice.culvert("env", "deployment/cart", "--mounts", dir, "--format", "json")
	var vars map[string]string
	if err := json.Unmarshal([]byte(r.Stdout), &vars); r.Code != 0 || err != nil {
		t.Fatalf("env: %v, %v", err, r)
	}
	// What the container really has, but for what its runtime adds.
	pod := words(t, "-n", "shop", "get", "pods", "-l", "app=cart", "-o", "jsonpath={.items[*].spec.nodeName}")
	for name, want := range map[string]string{"CURRENCY": "EUR", "PASSWORD": "pass word's", "APP": "cart", "GREETING": "hello cart"} {
		if vars[name] != want {
			t.Errorf("%s is %q, want %q", name, vars[name], want)
		}
	}
	if node := vars["NODE_NAME"]; !strings.Contains(strings.Join(pod, " "), node) || node == "" {
		t.Errorf("NODE_NAME is %q, pods are on %v", node, pod)
	}
	if host := vars["CART_SERVICE_HOST"]; host != clusterIP(t, "cart") {
		t.Errorf("CART_SERVICE_HOST is %q", host)
	}
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm() != 0o600 || info.Mode().Type() != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		b, err := os.ReadFile(path)
		files[strings.TrimPrefix(path, dir)] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"/etc/cart/limits.yaml": "items: 7\n", "/etc/cart/CURRENCY": "EUR", "/etc/keys/sub/token": "t0ken"} {
		if files[path] != want {
			t.Errorf("%s is %q, want %q, of %v", path, files[path], want, files)
		}
	}
	t.Run("run", func(t *testing.T) {
		r := alice.culvert("run", "--env-from", "deployment/cart", "--env", "MORE=1", "--", "/bin/sh", "-c", `echo "$CURRENCY $PASSWORD $GREETING $MORE $HOME"; exit 7`)
		if want := "EUR pass word's hello cart 1 " + lab.Home(netlab.Alice); r.Code != 7 || strings.TrimSpace(r.Stdout) != want {
			t.Errorf("run: %v, want %q", r, want)
		}
	})
	t.Run("evaluated by a shell", func(t *testing.T) {
		config := kubeconfig(t, "", "developer")
		if got := sh(t, `eval "$(culvert env deployment/cart --format export -n shop --kubeconfig `+config+`)"; echo "$PASSWORD $GREETING"`); got != "pass word's hello cart" {
			t.Errorf("a shell has %q", got)
		}
	})
}
