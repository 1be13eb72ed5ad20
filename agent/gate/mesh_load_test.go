package gate

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// TestMeshLoad: members come and go under load, and no request is lost, POSTs included.
func TestMeshLoad(t *testing.T) {
	t.Parallel()
	a, b := httpAgent(t, answerer("a")), httpAgent(t, answerer("b"))
	g := startGate(t, Config{}, nil)
	route := meshRoute(t, httpServer(t, "origin"), intercept.HTTPSniff)
	g.push(meshState(1, route, meshMember("a", a, "header:VERSION=a")))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var wg sync.WaitGroup
	var machines, total atomic.Int64
	for i := range 6 {
		mark := []string{"a", "b", ""}[i%3]
		tr := &http.Transport{MaxIdleConnsPerHost: 1}
		client := &http.Client{Transport: tr, Timeout: 10 * time.Second}
		wg.Go(func() {
			defer tr.CloseIdleConnections()
			for n := 0; ctx.Err() == nil; n++ {
				body := fmt.Sprint(i, "-", n)
				r, _ := http.NewRequest([]string{"POST", "PUT"}[n%2], fmt.Sprintf("http://127.0.0.1:%d/", route.Listen), strings.NewReader(body))
				r.Header.Set("VERSION", mark)
				resp, err := client.Do(r)
				if err != nil {
					t.Errorf("request %s: %v", body, err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				name, rest, _ := strings.Cut(string(got), " ")
				if err != nil || resp.StatusCode != 200 || rest != body || name != "origin" && name != mark {
					t.Errorf("request %s: %d %q, %v", body, resp.StatusCode, got, err)
					return
				}
				total.Add(1)
				if name != "origin" {
					machines.Add(1)
				}
			}
		})
	}
	for n := range 20 {
		members := []intercept.Member{meshMember("a", a, "header:VERSION=a"), meshMember("b", b, "header:VERSION=b")}
		g.push(meshState(int64(2+n), route, members[:n%3]...))
		time.Sleep(30 * time.Millisecond)
	}
	stop()
	wg.Wait()
	if m := machines.Load(); m == 0 || m == total.Load() {
		t.Errorf("machines served %d of %d", m, total.Load())
	}
}
