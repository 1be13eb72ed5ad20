package network

import (
	"os"
	"path/filepath"
	"testing"
)

// Another site's end takes the folder of namespaces away whenever it is empty.
func TestCreateBesideAnEnd(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := filepath.Join(t.TempDir(), "netns")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_ = os.Remove(dir) // fails while something is in it
			}
		}
	}()
	for range 100 {
		n, err := Create(filepath.Join(dir, "one"))
		if err != nil {
			t.Error(err)
			break
		}
		n.Close()
		if err := Remove(filepath.Join(dir, "one")); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	<-stopped
}
